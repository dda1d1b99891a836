"""The safetensors files of a checkpoint folder as they are: which tensors they hold, of what type and shape, and where.

Never unpickles anything. Knows the files, not what a tensor is for or what its values mean (`model.stored_weights`
does). Runs in the worker process.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.architectures.raw import RawConfig, read_json
from model.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
"""Floating-point types as the file's header names them; nothing else is weights."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's entry in a file's header; or a weight made of several of them."""

    name: str
    file: Path
    kind: str
    """Its type as the header names it, or the method by which it is quantized."""
    dtype: torch.dtype | None
    """None for what is not weights (masks, position ids)."""
    shape: tuple[int, ...]
    outputs_first: bool = False
    """Whether it is [out, in] even where the family stores [in, out]."""

    @property
    def num_bytes(self) -> int:
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    def refused(self, reason: str) -> CheckpointError:
        file = self.file.name
        return CheckpointError(f"{file}: tensor {self.name!r} {reason}", file=file, tensor=self.name)


class StoredTensors:
    """The tensors of a checkpoint folder by stored name; the files stay open (mapped) until `__exit__`.

    `single` is the file that has all of them; where it is not there, an index says which files have.
    """

    def __init__(self, folder: Path, single: str = SINGLE_NAME) -> None:
        self._stack = ExitStack()
        self._single = single
        self._files: dict[Path, Any] = {}
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}

    def __enter__(self) -> "StoredTensors":
        with self._stack:
            expected = {} if (self.folder / self._single).is_file() else _listed_files(self.folder)
            for path in dict.fromkeys(expected.values()) or [self.folder / self._single]:
                self._open(path)
            for name, path in expected.items():
                if name not in self.tensors or self.tensors[name].file != path:
                    raise CheckpointError(
                        f"{INDEX_NAME} says that {path.name} holds {name!r}; it does not", file=path.name, tensor=name
                    )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, tensor: StoredTensor) -> Tensor:
        try:
            found: Tensor = self._files[tensor.file].get_tensor(tensor.name)
        except SafetensorError as error:
            raise tensor.refused(f"cannot be read: {error}") from error
        return found

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}", file=path.name) from error
        self._files[path] = file
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name in self.tensors:
                other = self.tensors[name].file.name
                raise CheckpointError(f"{name!r} is in {other} and in {path.name}", file=path.name, tensor=name)
            header = file.get_slice(name)
            kind = header.get_dtype()
            self.tensors[name] = StoredTensor(name, path, kind, DTYPES.get(kind), tuple(header.get_shape()))


def _listed_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file by the index."""
    index = folder / INDEX_NAME
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = RawConfig(read_json(index), INDEX_NAME).section("weight_map").values
    listed: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        # A file name is a bare name: an index must not be able to point out of its folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_NAME} puts {tensor!r} into {name!r}, which is not the name of a safetensors file beside it",
                file=INDEX_NAME,
                tensor=tensor,
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{INDEX_NAME} names {name}, which is not in {folder}", file=name, tensor=tensor)
        listed[tensor] = folder / name
    if not listed:
        raise CheckpointError(f"{INDEX_NAME} lists no tensors", file=INDEX_NAME)
    return listed


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} has its weights only as {pickles[0]}, a pickle, which can run code when it is read; "
            "convert it to safetensors",
            file=pickles[0],
        )
    return CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}", file=SINGLE_NAME)


def common_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that most of the bytes are stored in; of 8 bits, bfloat16, which holds all of their values."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype is not None:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_bytes
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return torch.bfloat16 if most.itemsize == 1 else most
