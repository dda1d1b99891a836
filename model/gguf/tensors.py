"""The tensors of GGUF files under their original names: as they are where they are plain, else made plain in float32.

One tensor at a time, a part of it at a time: beside the result there is never more than a few MiB. Knows files and
names, not what a tensor is for. Runs in the worker process.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.errors import CheckpointError
from model.gguf.blocks import plain
from model.gguf.container import GgufFile, TensorInfo, files_of
from model.gguf.facts import Facts
from model.gguf.families import family_of
from model.gguf.names import ONE_ROW, ROTARY, Naming
from model.stored_tensors import DTYPES, StoredTensor

QUANTIZED_DTYPE = torch.bfloat16
"""What a quantized weight counts as stored in."""
PART_BYTES = 1 << 17
"""So few that what they become stays in the caches of a core."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is, and what of its conversion is to be undone: a number that was added, heads interleaved or put
    kind by kind."""

    file: GgufFile
    info: TensorInfo
    offset: float
    num_heads: int | None
    num_regrouped: int | None


class GgufTensors:
    """As `StoredTensors`, of the GGUF files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._places: dict[str, Place] = {}
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}

    def __enter__(self) -> "GgufTensors":
        with self._stack:
            facts = Facts([self._stack.enter_context(GgufFile(path)) for path in files_of(self.folder)])
            naming = family_of(facts).naming
            for file in facts.files:
                for info in file.tensors.values():
                    if info.name not in ROTARY:
                        self._add_all(facts, naming, file, info)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, tensor: StoredTensor) -> Tensor:
        """A plain tensor as it is stored, a quantized one in float32."""
        place = self._places[tensor.name]
        read = _read_plain if place.info.kind.is_plain else _read_blocks
        values = read(place.file, place.info)
        if place.offset:
            values -= place.offset
        if place.num_regrouped is not None:
            return _by_head(values, place.num_regrouped, tensor)
        return values if place.num_heads is None else _apart(values, place.num_heads, tensor)

    def _add_all(self, facts: Facts, naming: Naming, file: GgufFile, info: TensorInfo) -> None:
        """A tensor, or each expert's matrix of a tensor that has those of all."""
        name = naming.original(info.name)
        if "{}" not in name:
            flat = len(info.shape) == 1 and ONE_ROW.fullmatch(info.name)
            shape = (1, *info.shape) if flat else info.shape
            self._add(name, _place(facts, naming, file, replace(info, shape=shape)))
            return
        count = facts.size("expert_count")
        if len(info.shape) != 3 or info.shape[0] != count:
            message = (
                f"{file.path.name}: tensor {info.name!r} has shape {list(info.shape)}, not matrices of {count} experts"
            )
            raise CheckpointError(message, file=file.path.name, tensor=info.name)
        size = info.num_bytes // count
        for expert in range(count):
            part = replace(info, shape=info.shape[1:], start=info.start + expert * size, num_bytes=size)
            self._add(name.format(expert), _place(facts, naming, file, part))

    def _add(self, name: str, place: Place) -> None:
        info, path = place.info, place.file.path
        if name in self._places:
            message = f"{info.name!r} is in {self._places[name].file.path.name} and in {path.name}"
            raise CheckpointError(message, file=path.name, tensor=info.name)
        dtype = DTYPES.get(info.kind.name, QUANTIZED_DTYPE)
        self._places[name] = place
        self.tensors[name] = StoredTensor(name, path, info.kind.name, dtype, info.shape, outputs_first=True)


def _place(facts: Facts, naming: Naming, file: GgufFile, info: TensorInfo) -> Place:
    key = naming.heads_key(info.name)
    num_heads = None if key is None else facts.size(key, facts.size("attention.head_count"))
    num_regrouped = facts.size("attention.head_count") if naming.is_regrouped(info.name) else None
    return Place(file, info, naming.offset(info.name), num_heads, num_regrouped)


def _apart(values: Tensor, num_heads: int, tensor: StoredTensor) -> Tensor:
    """The halves of each head one below the other, as they are rotated here, of rows that lie in pairs.

    Worked example: a head of 4 rows is stored as 0 2 1 3 and becomes 0 1 2 3.
    """
    if values.shape[0] % (2 * num_heads):
        raise tensor.refused(f"has {values.shape[0]} rows, which are no {num_heads} heads of pairs")
    # [head, D / 2, half, ...] to [head, half, D / 2, ...]
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _by_head(values: Tensor, num_heads: int, tensor: StoredTensor) -> Tensor:
    """Rows that lie by queries, keys and values as they lay: head by head."""
    if values.shape[0] % (3 * num_heads):
        raise tensor.refused(f"has {values.shape[0]} rows, which are no {num_heads} heads' queries, keys and values")
    kinds = values.reshape(3, num_heads, -1, *values.shape[1:])
    return kinds.transpose(0, 1).reshape(values.shape)


def _read_plain(file: GgufFile, info: TensorInfo) -> Tensor:
    values = torch.empty(info.shape, dtype=DTYPES[info.kind.name])
    raw = values.view(-1).view(torch.uint8).numpy()
    for start in range(0, info.num_bytes, PART_BYTES):
        part = file.read(info, start, num_bytes=PART_BYTES)
        raw[start : start + len(part)] = np.frombuffer(part, np.uint8)
    return values


def _read_blocks(file: GgufFile, info: TensorInfo) -> Tensor:
    size = info.kind.num_bytes
    values = np.empty((info.num_bytes // size, info.kind.num_values), np.float32)
    num_blocks = PART_BYTES // size
    for start in range(0, len(values), num_blocks):
        raw = np.frombuffer(file.read(info, start * size, num_bytes=num_blocks * size), np.uint8)
        values[start : start + num_blocks] = plain(info.kind.name, raw.reshape(-1, size))
    return torch.from_numpy(values).reshape(info.shape)
