"""Adapters of experts: merged as those of any projection, and refused by name where the base is shared."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model.adapters.pairs import load_adapter_weights
from model.errors import UnsupportedArchitectureError
from tests.model.adapters.conftest import Store, pair, parameters
from tests.model.adapters.test_families import FAMILIES

ADAPTED = {
    "qwen3_moe": ("mlp.experts.1.gate_proj", "mlp.experts.4.down_proj", "mlp.gate"),
    "qwen2_moe": ("mlp.experts.0.up_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"),
    "mixtral": ("block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w2", "block_sparse_moe.gate"),
    "olmoe": ("mlp.experts.5.up_proj",),
}


@pytest.fixture(params=ADAPTED)
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A base, and the modules of its second layer that an adapter changes."""
    make: Callable[[], PreTrainedModel] = FAMILIES[request.param]
    make().save_pretrained(tmp_path / "base")
    return tmp_path / "base", tuple(f"model.layers.1.{name}" for name in ADAPTED[request.param])


def test_adapters_of_experts_are_merged(adapted: tuple[Path, tuple[str, ...]], store: Store, tmp_path: Path) -> None:
    base, modules = adapted
    stored = load_file(base / "model.safetensors")
    tensors = {}
    for module in modules:
        parts = pair(module, *stored[f"{module}.weight"].shape)
        a, b = parts.values()
        stored[f"{module}.weight"] += 1.5 * (b @ a)
        tensors |= parts
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(stored, tmp_path / "merged" / "model.safetensors")
    before, expected, found = (parameters(path) for path in (base, tmp_path / "merged", store(tensors)))
    assert sum(not torch.equal(before[name], expected[name]) for name in expected) == len(modules)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-6)


def test_adapters_of_experts_are_not_shared(adapted: tuple[Path, tuple[str, ...]], store: Store) -> None:
    base, modules = adapted
    shape = load_file(base / "model.safetensors")[f"{modules[0]}.weight"].shape
    folder = store(pair(modules[0], *shape))
    with pytest.raises(UnsupportedArchitectureError, match=f"{modules[0]}.*no projection of a layer.*merged"):
        load_adapter_weights(folder, base, torch.float32, torch.device("cpu"))
