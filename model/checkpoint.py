"""From stored weights to a filled network: streamed tensor by tensor, cast to one dtype, every name accounted for.

Knows names and shapes, not what a parameter is for (an architecture's `WeightMap` says where it comes from) nor how a
weight lies in the files (`model.stored_weights` reads it) or what an adapter adds to it (`model.adapters.merging`).
Runs in the worker process.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.adapters.merging import open_weights
from model.architectures.mapping import HeadOrder, Names, Part, WeightMap
from model.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from model.decoder import Decoder
from model.description import read_architecture
from model.encoder import Encoder
from model.encoder_decoder import EncoderDecoder
from model.errors import CheckpointError
from model.layers import Device
from model.parallel import Division
from model.stored_tensors import DTYPES, StoredTensor
from model.stored_weights import StoredWeights

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in total."""

Finished = Callable[[str, nn.Module], nn.Module]
"""Given a module's name and the module, whose parameters are all filled: what takes its place, or itself."""

Network = Decoder | Encoder | EncoderDecoder

NETWORKS: Mapping[type, Callable[..., Network]] = {
    DecoderConfig: Decoder,
    EncoderConfig: Encoder,
    EncoderDecoderConfig: EncoderDecoder,
}


def load_network(
    folder: Path | str,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    max_model_len: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    finished: Finished | None = None,
) -> Network:
    """The network of a checkpoint folder, its parameters filled, in `dtype` (None: as stored).

    `finished` is asked module by module, so that what it packs need not be held as it is stored, too.
    With several ranks (and without `finished`), this rank's part of a decoder; it never holds more than one whole
    parameter.
    Raises: CheckpointError, naming the file and the tensor at fault.
    """
    folder = Path(folder)
    raw, _, architecture = read_architecture(folder)
    config = architecture.configure(raw, max_model_len)
    network = NETWORKS[type(config)](config, device)
    weights = architecture.weights(config)
    if num_ranks == 1:
        fill(network, folder, weights, device=device, dtype=dtype, progress=progress, finished=finished)
        return network
    assert finished is None, "a division is of projections as they are"
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
    finished: Finished | None = None,
) -> None:
    """Replaces the network's meta parameters by stored tensors, one parameter at a time.

    `part` says what is kept of a whole parameter, given its name; only that goes to the device. `finished` says what
    takes a module's place when its parameters are filled.
    Peak memory is the network, as `finished` has it, with the largest parameter and the largest stored tensor (this in
    float32, where it is quantized or an adapter is merged into it): files are mapped, not read whole.
    Raises: CheckpointError for tensors that are missing, left over, misshapen, or files that are broken.
    """
    with open_weights(folder, weight_map) as stored:
        names = _resolve(stored, weight_map)
        dtype = stored.common_dtype() if dtype is None else dtype
        wanted = [source.name for sources in weight_map.parameters.values() for source in sources]
        total = sum(stored.tensors[name].num_bytes for name in {names[name] for name in wanted if name in names})
        done = 0
        present = {
            target: {source: stored.tensors[names[source.name]] for source in sources if source.name in names}
            for target, sources in weight_map.parameters.items()
        }
        keys = {target: _memory_of(network, target, found, weight_map) for target, found in present.items()}
        uses = Counter(keys.values())
        filled: dict[_Memory, nn.Parameter] = {}
        for target, sources in weight_map.parameters.items():
            key = keys[target]
            if key not in filled:
                own = torch.float32 if target in weight_map.wide else dtype
                whole = torch.zeros(key.shape, dtype=own, device=device if part is None else "cpu")
                _fill_parameter(whole, present[target], sources, stored)
                kept = whole if part is None else part(target, whole).to(device)
                filled[key] = nn.Parameter(kept, requires_grad=False)
                done += sum(_num_bytes(tensor, source) for source, tensor in present[target].items())
                del whole, kept
            _set_parameter(network, target, filled[key])
            uses[key] -= 1
            if not uses[key]:
                del filled[key]
            if finished is not None:
                _finish(network, target.rpartition(".")[0], finished)
            if progress is not None:
                progress(done, total)
    unfilled = [name for name, tensor in network.named_parameters() if tensor.is_meta]
    assert not unfilled, f"the weight map leaves out {unfilled}"


class _Memory(NamedTuple):
    """What a parameter is filled with: one stored tensor may stand for several (`aliases`), which share its memory."""

    name: str
    transposed: bool
    matrix: tuple[int, int] | None
    shape: torch.Size


def _memory_of(network: nn.Module, target: str, present: Mapping[Part, StoredTensor], weight_map: WeightMap) -> _Memory:
    sources = weight_map.parameters[target]
    single = present[sources[0]].name if len(sources) == 1 and present else target
    return _Memory(single, sources[0].transposed, sources[0].matrix, network.get_parameter(target).shape)


def _finish(network: nn.Module, name: str, finished: Finished) -> None:
    """Once the last of a module's parameters is filled."""
    module = network.get_submodule(name)
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return
    made = finished(name, module)
    if made is not module:
        network.set_submodule(name, made)


def _resolve(stored: StoredWeights, weight_map: WeightMap) -> dict[str, str]:
    """Names that the weight map asks for, to the names under which they are stored.

    Raises: CheckpointError if any is missing, or any stored tensor is neither asked for nor known to be ignorable.
    """
    names = Names(weight_map)
    found: dict[str, str] = {}
    extra: list[StoredTensor] = []
    for tensor in stored:
        name = names.name(tensor.name)
        if name in names.known:
            if name in found:
                raise CheckpointError(
                    f"{tensor.file.name} holds {tensor.name!r} as well as {found[name]!r}, which mean the same",
                    file=tensor.file.name,
                    tensor=tensor.name,
                )
            found[name] = tensor.name
        elif not names.are_ignored(name) and not stored.adds_nothing(tensor):
            extra.append(tensor)
    for group in weight_map.aliases:
        first = next((found[name] for name in group if name in found), None)
        if first is not None:
            found |= {
                name: first
                for name in group
                if name not in found or (name in names.wanted and _are_same(stored, first, found[name]))
            }
    missing = sorted(names.wanted.difference(found, weight_map.zeros))
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


def _are_same(stored: StoredWeights, one: str, other: str) -> bool:
    first, second = stored.tensors[one], stored.tensors[other]
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return one == other or (alike and torch.equal(stored.read(first), stored.read(second)))


def _fill_parameter(
    parameter: Tensor, present: Mapping[Part, StoredTensor], sources: tuple[Part, ...], stored: StoredWeights
) -> None:
    """Copies stored tensors into a parameter of zeros, one below the other, with the cast to its dtype and device."""
    _check_shapes(parameter, present)
    start = 0
    for source in sources:
        if source not in present:
            start += source.rows or 0
            continue
        end = start + _shape(present[source], source)[0]
        parameter[start:end].copy_(_read(present[source], source, stored))
        start = end


def _num_bytes(tensor: StoredTensor, source: Part) -> int:
    return tensor.num_bytes if source.matrix is None else tensor.num_bytes // source.matrix[1]


def _read(tensor: StoredTensor, source: Part, stored: StoredWeights) -> Tensor:
    value = stored.read(tensor)
    value = value if source.matrix is None else value[source.matrix[0]]
    value = value.T if _is_turned(tensor, source) else value
    value = value.flatten() if source.flattened else value
    return value if source.order is None else reordered(value, source.order)


def reordered(rows: Tensor, order: HeadOrder) -> Tensor:
    """Rows of a projection to heads, as ours lie."""
    heads = rows.reshape(-1, order.head_size, *rows.shape[1:])  # [H, D, ...]
    heads = heads[list(order.heads)] if order.heads else heads.clone()
    turned = heads[: order.num_paired_heads, : order.paired]
    turned.copy_(torch.cat((turned[:, 0::2], turned[:, 1::2]), dim=1))
    return heads.view(rows.shape)


def _check_shapes(parameter: Tensor, present: Mapping[Part, StoredTensor]) -> None:
    shapes = [_shape(tensor, source) for source, tensor in present.items()]
    num_rows = sum(shape[0] for shape in shapes if shape)
    for (source, tensor), shape in zip(present.items(), shapes, strict=True):
        if tensor.dtype is None:
            raise tensor.refused(f"is not stored as {', '.join(DTYPES)}")
        others = num_rows - shape[0] if shape else num_rows
        rows = parameter.shape[0] - others if source.rows is None else source.rows
        expected = (rows, *parameter.shape[1:])
        count = () if source.matrix is None else source.matrix[1:]
        if shape != expected or tensor.shape[: len(count)] != count:
            wanted = [*count, *(expected[::-1] if _is_turned(tensor, source) else expected)]
            raise tensor.refused(f"has shape {list(tensor.shape)}; config.json asks for {wanted}")


def _shape(tensor: StoredTensor, source: Part) -> tuple[int, ...]:
    """The tensor's as it goes into the parameter."""
    if source.flattened:
        return (math.prod(tensor.shape),)
    shape = tensor.shape if source.matrix is None else tensor.shape[1:]
    return shape[::-1] if _is_turned(tensor, source) else shape


def _is_turned(tensor: StoredTensor, source: Part) -> bool:
    return source.transposed and not tensor.outputs_first


def _set_parameter(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(owner), attribute, parameter)
