"""The weights of a checkpoint folder by name, however they are stored: quantized ones are made plain as they are read.

Puts the folder's files (`model.stored_tensors`) and what its `config.json` says of quantization (`model.quantized`)
together, so that neither an architecture's names nor what fills a network know of it. Runs in the worker process.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.architectures.raw import RawConfig, read_json
from model.gguf.container import files_of
from model.gguf.tensors import GgufTensors
from model.quantized.config import read_quantization
from model.quantized.formats import UNUSED, Format, format_of
from model.quantized.parts import Parts
from model.stored_tensors import StoredTensor, StoredTensors, common_dtype

CONFIG_NAME = "config.json"


class StoredWeights:
    """As `StoredTensors`, but a weight that lies there in parts is one of `tensors`, named as if it were plain.

    What else belongs to a quantization (the scales of inputs) is not among them.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files = GgufTensors(folder) if files_of(folder) else StoredTensors(folder)
        self._quantized: dict[str, Callable[[], Tensor]] = {}
        self._divided: dict[str, Callable[[], Tensor]] = {}
        self._put: dict[str, Callable[[], Tensor]] = {}
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}

    def __enter__(self) -> "StoredWeights":
        with self._stack:
            self._stack.enter_context(self._files)
            self.tensors = dict(self._files.tensors)
            path = self.folder / CONFIG_NAME
            quantization = read_quantization(RawConfig(read_json(path))) if path.is_file() else None
            if quantization is not None:
                self._gather(format_of(quantization))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[StoredTensor]:
        return iter(self.tensors.values())

    def read(self, tensor: StoredTensor) -> Tensor:
        """A plain tensor as it is stored, a quantized one in float32; or what has been put in its place."""
        make = self._put.get(tensor.name)
        return self.read_stored(tensor) if make is None else make()

    def put(self, tensor: StoredTensor, read: Callable[[], Tensor], *, instead_of: StoredTensor | None = None) -> None:
        """From now on there is this tensor, which `read` makes, and no longer the other."""
        if instead_of is not None:
            del self.tensors[instead_of.name]
        self.tensors[tensor.name] = tensor
        self._put[tensor.name] = read

    def read_stored(self, tensor: StoredTensor) -> Tensor:
        """As `read`, of the folder's own files, whatever has been put in their place."""
        make = self._divided.get(tensor.name) or self._quantized.get(tensor.name)
        return self._files.read(tensor) if make is None else make()

    def divide(self, fused: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Puts tensors of equally many rows each in the place of those that hold them one below the other.

        Worked example: ("attn.Wqkv", ("attn.q", "attn.k", "attn.v")) makes three of "layers.0.attn.Wqkv.weight".
        """
        for tensor in list(self):
            module, _, attribute = tensor.name.rpartition(".")
            for end, names in fused:
                if module.endswith(f".{end}"):
                    self._divide(tensor, [f"{module.removesuffix(end)}{name}.{attribute}" for name in names])

    def _divide(self, tensor: StoredTensor, names: Sequence[str]) -> None:
        if not tensor.shape or tensor.shape[0] % len(names):
            raise tensor.refused(f"has shape {list(tensor.shape)}, whose rows are not of {len(names)} modules")
        num_rows = tensor.shape[0] // len(names)
        del self.tensors[tensor.name]
        for place, name in enumerate(names):
            self.tensors[name] = replace(tensor, name=name, shape=(num_rows, *tensor.shape[1:]))
            self._divided[name] = partial(self._rows, tensor, place * num_rows, num_rows)

    def _rows(self, tensor: StoredTensor, first: int, num_rows: int) -> Tensor:
        return self.read_stored(tensor)[first : first + num_rows]

    def common_dtype(self) -> torch.dtype:
        return common_dtype(self)

    def adds_nothing(self, tensor: StoredTensor) -> bool:
        """Whether it is a bias of zeros beside a quantized weight: AutoGPTQ writes one where the network has none."""
        module, _, name = tensor.name.rpartition(".")
        return name == "bias" and f"{module}.weight" in self._quantized and not bool(self.read(tensor).any())

    def _gather(self, stored_as: Format) -> None:
        """Puts one tensor in the place of those that make up a weight."""
        quantized = [parts for parts in self._modules(stored_as.parts) if not parts.plain]
        gone = {header.name for parts in quantized for header in parts.headers.values()}
        gone |= {name for name in self.tensors if name.rpartition(".")[2] in UNUSED}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in gone}
        dtype = common_dtype(self)  # a quantized weight counts as stored in what most of the others are
        for parts in quantized:
            name, first = f"{parts.module}.weight", next(iter(parts.headers.values()))
            if name in self.tensors:
                raise self.tensors[name].refused(f"is there as well as {first.name!r}, which mean the same")
            shape = stored_as.shape(parts)
            self.tensors[name] = StoredTensor(name, first.file, "quantized", dtype, shape, outputs_first=True)
            self._quantized[name] = partial(stored_as.weight, parts)

    def _modules(self, names: tuple[str, ...]) -> list[Parts]:
        """All modules of which any of these parts is stored."""
        pattern = re.compile(rf"(.+)\.({'|'.join(map(re.escape, names))})")
        modules: dict[str, dict[str, StoredTensor]] = {}
        for tensor in self.tensors.values():
            if found := pattern.fullmatch(tensor.name):
                modules.setdefault(found[1], {})[found[2]] = tensor
        return [Parts(module, headers, self._files.read) for module, headers in modules.items()]
