"""A file of llama.cpp's Q4_0, served in 4 bits, computes what the file says: its steps are found again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.compiled_layers import Int4Linear, Quantization, compile_layers
from model.decoder import Decoder
from model.gguf.blocks import plain
from model.gguf.container import GgufFile
from model.gguf.facts import Facts
from model.gguf.families import read_config
from model.gguf.kinds import KINDS
from model.ops import library
from tests.model.gguf.conftest import Unzip, Write

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")

Q4_0, GROUP = 2, 32
NUMBERS = {kind.name: number for number, kind in KINDS.items()}


def blocks_of(values: NDArray[np.float32]) -> bytes:
    """As ggml quantizes rows: the value of largest magnitude becomes -8; the lower bits are the first half's values."""
    groups = values.reshape(-1, GROUP)
    scales = np.take_along_axis(groups, np.abs(groups).argmax(1, keepdims=True), 1) / -8
    inverse = np.divide(1, scales, where=scales != 0, out=np.zeros_like(scales))
    steps = np.clip(np.trunc(groups * inverse + 8.5), 0, 15).astype(np.uint8)
    packed = steps[:, : GROUP // 2] | steps[:, GROUP // 2 :] << np.uint8(4)
    return np.concatenate([scales.astype(np.float16).view(np.uint8), packed], 1).tobytes()


@pytest.fixture
def folder(unzip: Unzip, write: Write) -> Path:
    """With a recorded file of Q8_0, its layers' weights anew in Q4_0."""
    source = unzip("llama-q8")
    tensors = {}
    with GgufFile(source) as read:
        for name, info in read.tensors.items():
            kind, raw = info.kind, read.read(info)
            if kind.name == "Q8_0" and name.startswith("blk."):
                values = plain("Q8_0", np.frombuffer(raw, np.uint8).reshape(-1, kind.num_bytes))
                tensors[name] = (Q4_0, info.shape, blocks_of(values))
            else:
                tensors[name] = (NUMBERS[kind.name], info.shape, raw)
        keys = dict(read.metadata)
    source.unlink()
    path = write(keys, tensors)
    with GgufFile(path) as written:
        (path.parent / "config.json").write_text(json.dumps(read_config(Facts([written]))))
    return path.parent


def logits(folder: Path, quantization: Quantization, dtype: torch.dtype) -> Tensor:
    network = load_network(folder, dtype=dtype)
    assert isinstance(network, Decoder)
    compile_layers(network, quantization, wide=network.output)
    assert any(isinstance(module, Int4Linear) for module in network.modules()) == (quantization == "int4")
    ids = torch.tensor([3, 17, 5, 24, 30, 12, 9, 31, 2, 28, 30, 7])
    layout = PackedLayout(starts=torch.tensor([0, len(ids)], dtype=torch.int32), max_len=len(ids))
    with torch.inference_mode():
        return network.logits(network(ids, torch.arange(len(ids)), PackedAttend(layout, ReferenceAttention())))


def test_in_4_bits_it_is_as_near_to_the_file_as_in_8(folder: Path) -> None:
    expected = logits(folder, "none", torch.float32)
    four, eight = (
        float((logits(folder, quantization, torch.bfloat16) - expected).norm() / expected.norm())
        for quantization in ("int4", "int8")
    )
    assert four < 1.2 * eight
