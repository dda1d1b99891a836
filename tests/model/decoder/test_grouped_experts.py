"""Experts in groups, as GPUs with kernels for them have them, computed here by what torch has for CPUs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ExpertsConfig
from model.cuda_graphs import can_be_captured
from model.experts import Router, SparseMLP
from model.fp8_linear import Fp8Linear, convert
from model.gpu_experts import GroupedMLP, groups

HIDDEN = 64


def make(intermediate_size: int = 32, **others: Any) -> SparseMLP:
    config = ExpertsConfig(
        num_experts=16, num_chosen=3, intermediate_size=intermediate_size, layers=frozenset([0]), shared_size=48,
        **others,
    )  # fmt: skip
    mlp = SparseMLP(HIDDEN, config, activation="silu")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in list(mlp.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        place, _, attribute = name.rpartition(".")
        setattr(mlp.get_submodule(place), attribute, nn.Parameter(values.bfloat16(), requires_grad=False))
    return mlp


def gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 37])
@pytest.mark.parametrize(
    "others",
    [{"normalized": True, "shared_gate": True}, {"scores": "sigmoid", "selection_bias": True, "scale": 2.0}],
    ids=["softmax", "sigmoid"],
)
def test_groups_give_what_experts_give_one_after_another(others: dict[str, Any], count: int) -> None:
    """With as few rows most experts have none."""
    mlp = make(**others)
    assert groups(mlp)
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).bfloat16()
    torch.testing.assert_close(GroupedMLP(mlp, gated)(x), mlp(x), rtol=0.01, atol=0.01)


def test_experts_without_kernels_stay_one_after_another() -> None:
    """Of odd sizes, in other types, or quantized."""
    assert not groups(make(intermediate_size=36))
    assert not groups(make().float())
    mlp = make()
    assert convert(mlp) == 2 * 16 + 2
    assert not groups(mlp)


def test_what_chooses_experts_is_not_quantized() -> None:
    mlp = make(shared_gate=True)
    convert(mlp)
    assert isinstance(mlp.router, Router)
    assert isinstance(mlp.shared_gate, Router)
    assert all(isinstance(expert.down, Fp8Linear) for expert in mlp.experts)


def test_only_groups_can_be_captured() -> None:
    network = nn.ModuleList([nn.ModuleList([make()])])
    assert not can_be_captured(network)
    network[0] = GroupedMLP(make(), gated)
    assert can_be_captured(network)


@torch.inference_mode()
def test_a_step_never_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph is made of may have no number that comes back to the host."""
    grouped = GroupedMLP(make(), gated)
    x = torch.randn(5, HIDDEN).bfloat16().to("meta")
    monkeypatch.setattr(F, "grouped_mm", lambda rows, weights, offs: rows.new_empty(len(rows), weights.shape[2]))
    assert grouped.to("meta")(x).shape == x.shape
