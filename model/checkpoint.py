"""From safetensors files to a filled network: streamed tensor by tensor, cast to one dtype, every name accounted for.

Never unpickles anything. Knows the files and the shapes, not what a parameter is for (an architecture's `WeightMap`
says where it comes from). Runs in the worker process.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.architectures.mapping import Part, WeightMap
from model.architectures.raw import RawConfig, read_json
from model.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from model.decoder import Decoder
from model.description import read_architecture
from model.encoder import Encoder
from model.encoder_decoder import EncoderDecoder
from model.errors import CheckpointError
from model.layers import Device
from model.parallel import Division

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in total."""

Network = Decoder | Encoder | EncoderDecoder

NETWORKS: Mapping[type, Callable[..., Network]] = {
    DecoderConfig: Decoder,
    EncoderConfig: Encoder,
    EncoderDecoderConfig: EncoderDecoder,
}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
"""Floating-point types as the file's header names them; nothing else is weights."""


def load_network(
    folder: Path | str,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    max_model_len: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Network:
    """The network of a checkpoint folder, its parameters filled, in `dtype` (None: as stored).

    With several ranks, this rank's part of a decoder; it never holds more than one whole parameter.
    Raises: CheckpointError, naming the file and the tensor at fault.
    """
    folder = Path(folder)
    raw, _, architecture = read_architecture(folder)
    config = architecture.configure(raw, max_model_len)
    network = NETWORKS[type(config)](config, device)
    weights = architecture.weights(config)
    if num_ranks == 1:
        fill(network, folder, weights, device=device, dtype=dtype, progress=progress)
        return network
    if not isinstance(network, Decoder):
        raise CheckpointError("only decoders are divided over ranks")
    division = Division(network.config, rank, num_ranks)
    fill(network, folder, weights, device=device, dtype=dtype, progress=progress, part=division.part)
    division.apply(network)
    return network


def fill(
    network: nn.Module,
    folder: Path,
    weight_map: WeightMap,
    *,
    device: Device,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    part: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Replaces the network's meta parameters by stored tensors, one parameter at a time.

    `part` says what is kept of a whole parameter, given its name; only that goes to the device.
    Peak memory is the network and the largest stored tensor: files are mapped, not read whole.
    Raises: CheckpointError for tensors that are missing, left over, misshapen, or files that are broken.
    """
    with StoredTensors(folder) as stored:
        names = _resolve(stored, weight_map)
        dtype = stored.common_dtype() if dtype is None else dtype
        wanted = [source.name for sources in weight_map.parameters.values() for source in sources]
        total = sum(stored.tensors[name].num_bytes for name in {names[name] for name in wanted if name in names})
        done = 0
        filled: dict[tuple[str, bool, torch.Size], nn.Parameter] = {}
        for target, sources in weight_map.parameters.items():
            tensors = [stored.tensors[names[source.name]] for source in sources if source.name in names]
            shape = network.get_parameter(target).shape
            # One stored tensor may stand for several parameters (`aliases`): they share its memory.
            single = tensors[0].name if len(sources) == 1 and tensors else target
            key = (single, sources[0].transposed, shape)
            if key not in filled:
                empty = torch.zeros(shape, dtype=dtype, device=device if part is None else "cpu")
                filled[key] = nn.Parameter(empty, requires_grad=False)
                _fill_parameter(filled[key], tensors, sources[: len(tensors)], stored)
                if part is not None:
                    filled[key] = nn.Parameter(part(target, filled[key].data).to(device), requires_grad=False)
                done += sum(tensor.num_bytes for tensor in tensors)
            _set_parameter(network, target, filled[key])
            if progress is not None:
                progress(done, total)
    unfilled = [name for name, tensor in network.named_parameters() if tensor.is_meta]
    assert not unfilled, f"the weight map leaves out {unfilled}"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's entry in a file's header."""

    name: str
    file: Path
    dtype: torch.dtype | None
    """None for what is not weights (masks, position ids)."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


class StoredTensors:
    """The tensors of a checkpoint folder by stored name; the files stay open (mapped) until `__exit__`."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}

    def __enter__(self) -> "StoredTensors":
        with self._stack:
            expected = _listed_files(self.folder)
            for path in dict.fromkeys(expected.values()) or [self.folder / SINGLE_NAME]:
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

    def __iter__(self) -> Iterator[StoredTensor]:
        return iter(self.tensors.values())

    def read(self, tensor: StoredTensor) -> Tensor:
        try:
            found: Tensor = self._files[tensor.file].get_tensor(tensor.name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{tensor.file.name}: cannot read {tensor.name!r}: {error}", file=tensor.file.name, tensor=tensor.name
            ) from error
        return found

    def common_dtype(self) -> torch.dtype:
        """The dtype that most of the bytes are stored in; of 8 bits, bfloat16, which holds all of their values."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self:
            if tensor.dtype is not None:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_bytes
        most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
        return torch.bfloat16 if most.itemsize == 1 else most

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
            self.tensors[name] = StoredTensor(name, path, DTYPES.get(header.get_dtype()), tuple(header.get_shape()))


def _listed_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file by the index; empty where there is no index."""
    if (folder / SINGLE_NAME).is_file():
        return {}
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


def _resolve(stored: StoredTensors, weight_map: WeightMap) -> dict[str, str]:
    """Names that the weight map asks for, to the names under which they are stored.

    Raises: CheckpointError if any is missing, or any stored tensor is neither asked for nor known to be ignorable.
    """
    wanted = {part.name for sources in weight_map.parameters.values() for part in sources}
    known = wanted.union(*weight_map.aliases)
    found: dict[str, str] = {}
    extra: list[StoredTensor] = []
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in weight_map.ignored) or r"(?!)")
    for tensor in stored:
        name = tensor.name
        for old, new in weight_map.renamed:
            name = name.replace(old, new)
        if name not in known and weight_map.prefix + name in known:
            name = weight_map.prefix + name
        if name in known:
            if name in found:
                raise CheckpointError(
                    f"{tensor.file.name} holds {tensor.name!r} as well as {found[name]!r}, which mean the same",
                    file=tensor.file.name,
                    tensor=tensor.name,
                )
            found[name] = tensor.name
        elif not ignored.fullmatch(name):
            extra.append(tensor)
    for group in weight_map.aliases:
        first = next((found[name] for name in group if name in found), None)
        if first is not None:
            found |= {
                name: first
                for name in group
                if name not in found or (name in wanted and _are_same(stored, first, found[name]))
            }
    missing = sorted(wanted.difference(found, weight_map.zeros))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{stored.folder}: tensor {missing[0]!r}{more} is missing", tensor=missing[0])
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{extra[0].file.name}: tensor {extra[0].name!r}{more} has no place in this architecture",
            file=extra[0].file.name,
            tensor=extra[0].name,
        )
    return found


def _are_same(stored: StoredTensors, one: str, other: str) -> bool:
    first, second = stored.tensors[one], stored.tensors[other]
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return one == other or (alike and torch.equal(stored.read(first), stored.read(second)))


def _fill_parameter(
    parameter: Tensor, tensors: list[StoredTensor], sources: tuple[Part, ...], stored: StoredTensors
) -> None:
    """Copies stored tensors into a parameter, one below the other, with the cast to its dtype and device."""
    _check_shapes(parameter, tensors, sources)
    start = 0
    for tensor, source in zip(tensors, sources, strict=True):
        value = stored.read(tensor)
        value = value.T if source.transposed else value
        if source.grouped_heads is not None:
            # [head, q/k/v, D, ...] to [q/k/v, head, D, ...]
            grouped = value.reshape(source.grouped_heads, 3, -1, *value.shape[1:])
            value = grouped.transpose(0, 1).reshape(value.shape)
        parameter[start : start + len(value)].copy_(value)
        start += len(value)


def _check_shapes(parameter: Tensor, tensors: list[StoredTensor], sources: tuple[Part, ...]) -> None:
    pairs = list(zip(tensors, sources, strict=True))
    shapes = [tensor.shape[::-1] if source.transposed else tensor.shape for tensor, source in pairs]
    num_rows = sum(shape[0] for shape in shapes if shape)
    for (tensor, source), shape in zip(pairs, shapes, strict=True):
        if tensor.dtype is None:
            raise _refused(tensor, f"is not stored as {', '.join(DTYPES)}")
        others = num_rows - shape[0] if shape else num_rows
        rows = parameter.shape[0] - others if source.rows is None else source.rows
        expected = (rows, *parameter.shape[1:])
        if shape != expected:
            wanted = list(expected[::-1] if source.transposed else expected)
            raise _refused(tensor, f"has shape {list(tensor.shape)}; config.json asks for {wanted}")


def _refused(tensor: StoredTensor, reason: str) -> CheckpointError:
    file = tensor.file.name
    return CheckpointError(f"{file}: tensor {tensor.name!r} {reason}", file=file, tensor=tensor.name)


def _set_parameter(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(owner), attribute, parameter)
