"""Packed projections compute what plain ones do, and their bytes are still counted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from model.compiled_layers import weight_bytes
from model.config import Activation
from model.encode_network import load_encode_network
from model.layers import MLP, Linear
from model.packed_linear import PackedLinear, pack

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def fill() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """fill(module): the module with random parameters on the CPU."""

    def filled(module: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        for name, parameter in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            value = torch.nn.Parameter(torch.randn(parameter.shape) * 0.1, requires_grad=False)
            setattr(module.get_submodule(owner), attribute, value)
        return module

    return filled


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_packed_linear_is_the_linear(
    num_rows: int, bias: bool, fill: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    linear = fill(Linear(40, 24, bias=bias))
    assert isinstance(linear, Linear)
    x = torch.randn(num_rows, 40)
    assert_close(PackedLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation_moves_into_the_packed_projection(
    activation: Activation, fill: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    mlp = fill(MLP(40, 64, activation=activation, bias=True))
    x = torch.randn(9, 40)
    expected = mlp(x)
    pack(mlp)
    assert isinstance(mlp.up, PackedLinear)
    assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_counted_packed_or_not(make_model: MakeModel) -> None:
    folder, model = make_model("albert", "ForSequenceClassification")
    plain, packed = (load_encode_network(folder, packed=packed) for packed in (False, True))
    assert weight_bytes(packed) == weight_bytes(plain) == 4 * sum(p.numel() for p in model.parameters())
