"""Adapters as PEFT saves them, over the tiny checkpoints: recorded ones, and any tensors under any settings."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import make
from torch import Tensor

from model.adapters.folder import find_base, joined
from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.decoder import Decoder
from model.description import describe
from model.encode_network import load_encode_network
from model.encoder_decoder import EncoderDecoder
from model.encoder_runner import EncodeItem, EncoderRunner
from tests.model.encoder_decoder.test_network import forward
from tests.model.hub.conftest import hub

__all__ = ["hub"]

RECORDED = sorted((Path(__file__).parents[2] / "reference" / "adapters").glob("*.safetensors"))
IDS = [3, 17, 5, 44, 60, 12, 9, 31, 2, 58, 40, 7]
TARGET_IDS = [1, 9, 30, 8, 77]
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "lora_alpha": 3}

Store = Callable[..., Path]
"""`store(tensors, base="llama", use_dora=True)`: an adapter's folder beside its base's; other settings by name."""


@dataclass
class Recording:
    """What `tests/reference/record_adapters.py` wrote of one case."""

    name: str
    base: str
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    logits: Tensor = field(repr=False)


def read_recording(path: Path) -> Recording:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata()
    config = json.loads(metadata["adapter_config.json"])
    return Recording(path.stem, metadata["base"], config, tensors, tensors.pop("logits"))


@pytest.fixture(params=RECORDED, ids=[path.stem for path in RECORDED])
def recording(request: pytest.FixtureRequest) -> Recording:
    return read_recording(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    def write(
        tensors: dict[str, Tensor],
        *,
        base: str = "llama",
        folder: str = "adapter",
        config: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        if not (tmp_path / "base").exists():
            make(base, tmp_path / "base")
        path = tmp_path / folder
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps((config or SETTINGS) | settings))
        save_file(tensors, path / "adapter_model.safetensors")
        return path

    return write


def pair(module: str, outputs: int, inputs: int, *, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A and B of one module, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }


def parameters(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Every parameter of the network of a folder, an adapter's or not, on plain layers."""
    with joined(folder, find_base(folder)) as whole:
        classifies = describe(whole).head != "language_model"
        network = load_encode_network(whole, packed=False) if classifies else load_network(whole, **options)
        return dict(network.named_parameters(remove_duplicate=False))


def logits(folder: Path) -> Tensor:
    """What the network makes of `IDS` (and `TARGET_IDS`): [T, V], or [L] of a classifier."""
    with joined(folder, find_base(folder)) as whole:
        if describe(whole).head != "language_model":
            runner = EncoderRunner(load_encode_network(whole, packed=False), ReferenceAttention())
            (found,) = runner.run([EncodeItem(ids=IDS, output="logits")])
            return torch.from_numpy(found)
        network = load_network(whole)
    if isinstance(network, EncoderDecoder):
        return forward(network, [torch.tensor(IDS)], [torch.tensor(TARGET_IDS)])[1]
    assert isinstance(network, Decoder)
    layout = PackedLayout(starts=torch.tensor([0, len(IDS)], dtype=torch.int32), max_len=len(IDS))
    with torch.inference_mode():
        positions = torch.arange(len(IDS))
        return network.logits(network(torch.tensor(IDS), positions, PackedAttend(layout, ReferenceAttention())))
