"""GGUF files: those that llama.cpp's converter wrote, and any that a test makes up, byte by byte."""

import gzip
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from torch import Tensor

RECORDED = Path(__file__).parents[2] / "reference" / "gguf"

Unzip = Callable[[str], Path]
"""`unzip("llama")`: that recorded file."""
Write = Callable[..., Path]
"""`write(keys, tensors, name="x.gguf")`: a file of these keys and tensors (name to type's number, shape and bytes)."""


@dataclass(frozen=True)
class Expected:
    """What `tests/reference/record_gguf.py` computed of the originals."""

    tensors: Mapping[str, Tensor]
    ids: Mapping[str, Mapping[str, list[int]]]


@pytest.fixture(scope="session")
def expected() -> Expected:
    data = gzip.decompress((RECORDED / "expected.safetensors.gz").read_bytes())
    length = int.from_bytes(data[:8], "little")
    return Expected(load(data), json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ids"]))


@pytest.fixture
def unzip(tmp_path: Path) -> Unzip:
    def make(name: str) -> Path:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(gzip.decompress((RECORDED / f"{name}.gguf.gz").read_bytes()))
        return path

    return make


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(
        keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], name: str = "model.gguf"
    ) -> Path:
        path = tmp_path / name
        path.write_bytes(file_of(keys, tensors))
        return path

    return make


def file_of(
    keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], *, version: int = 3
) -> bytes:
    """Shapes have the rows first, as in torch."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(_text(key) + _value(value) for key, value in keys.items())
    data = b""
    for tensor, (kind, shape, raw) in tensors.items():
        head += _text(tensor) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """With the number of its type before it."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    items = [_value(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 5)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
