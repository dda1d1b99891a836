"""The operator of all experts computes what they compute one by one, and a row the same in any company."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.compiled_layers import CompiledSparseMLP, Quantization, compile_layers, weight_bytes
from model.config import ExpertsConfig
from model.experts import SparseMLP
from model.ops import library

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")

HIDDEN = 128
TOLERANCES: dict[Quantization, float] = {"none": 0.006, "int8": 0.03, "int4": 0.2}
"""Mean error, as a share of what results are."""


@pytest.fixture(autouse=True)
def _set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def make(*, intermediate_size: int = 64, normalized: bool = True, **others: Any) -> nn.Module:
    """A module whose only child is a sparse MLP, in float32: random weights that bfloat16 holds."""
    config = ExpertsConfig(
        num_experts=7, num_chosen=3, intermediate_size=intermediate_size, layers=frozenset([0]),
        normalized=normalized, **others,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    owner = nn.Module()
    mlp = SparseMLP(HIDDEN, config, activation="silu")
    owner.add_module("mlp", mlp)
    for name, parameter in list(mlp.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[-1] ** -0.5
        place, _, attribute = name.rpartition(".")
        setattr(mlp.get_submodule(place), attribute, nn.Parameter(values.bfloat16().float(), requires_grad=False))
    return owner


def compiled(owner: nn.Module, quantization: Quantization) -> nn.Module:
    bias = owner.mlp.selection_bias
    owner = deepcopy(owner).bfloat16()
    owner.mlp.selection_bias = bias
    compile_layers(owner, quantization)
    return owner


def rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).bfloat16()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared by a gate": {"shared_size": 160, "shared_gate": True, "normalized": False},
    "sigmoids and a bias": {"scores": "sigmoid", "selection_bias": True, "scale": 1.5, "shared_size": 32},
    "not joined": {"intermediate_size": 40, "scores": "sigmoid", "selection_bias": True},
}


@pytest.fixture(params=KINDS)
def owner(request: pytest.FixtureRequest) -> nn.Module:
    return make(**KINDS[request.param])


@pytest.mark.parametrize("quantization", TOLERANCES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_experts_compute_what_they_compute_in_float32(
    owner: nn.Module, quantization: Quantization, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    packed = compiled(owner, quantization)
    assert isinstance(packed.mlp, CompiledSparseMLP) == (owner.mlp.config.intermediate_size == 64)
    for count in (1, 2, 40):
        expected = owner.mlp(rows(count).float())
        found = packed.mlp(rows(count)).float()
        assert (found - expected).norm() < TOLERANCES[quantization] * expected.norm()


@pytest.mark.parametrize("quantization", TOLERANCES)
def test_a_row_is_the_same_to_a_bit_alone_and_in_any_company(owner: nn.Module, quantization: Quantization) -> None:
    mlp = compiled(owner, quantization).mlp
    x = rows(70)
    together = mlp(x)
    for begin, end in ((0, 1), (5, 6), (5, 21), (40, 42), (69, 70)):
        assert torch.equal(mlp(x[begin:end]), together[begin:end])
    torch.set_num_threads(3)
    assert torch.equal(mlp(x.flip(0)), together.flip(0))


def test_a_row_that_is_no_number_stays_alone() -> None:
    mlp = compiled(make(), "int8").mlp
    x = rows(9)
    expected = mlp(x)
    x[4] = torch.nan
    found = mlp(x)
    assert found[4].isnan().all()
    assert torch.equal(found[torch.arange(9) != 4], expected[torch.arange(9) != 4])


def test_experts_take_the_memory_of_their_packed_weights() -> None:
    owner = make(shared_size=64)
    num_weights = 8 * 3 * HIDDEN * 64
    sizes = {name: weight_bytes(compiled(owner, name)) for name in TOLERANCES}
    router = 32 * HIDDEN * 2
    assert sizes["none"] == 2 * num_weights + router
    assert sizes["int8"] < 1.1 * num_weights + router
    assert sizes["int4"] < 0.61 * num_weights + router


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) << 10


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells a process's memory")
def test_layers_that_run_one_by_one_have_one_room_between_them() -> None:
    """Each had its own: with 2,048 tokens a step 300 MB for each of the 16 layers of OLMoE."""
    mlps = [compiled(make(shared_size=32), "none").mlp for _ in range(8)]
    x = rows(8192)
    own = len(x) * (4 * 4 * HIDDEN + 3 * 2 * HIDDEN)  # what is made, and gathered, of the rows: most of it
    mlps[0](x)
    before = resident_bytes()
    for mlp in mlps[1:]:
        mlp(x)
    assert resident_bytes() - before < own
