"""What can be computed beside a shared base: where each pair of an adapter's tensors adds to a decoder's projections.

Answered from settings, names and shapes alone, so that the API process refuses what the worker could not compute. What
adds anything else than a product of low rank to a projection of a layer changes weights that others use, too: that can
only be merged (`model.adapters.merging`). No torch; both processes.

Legend: r rank; A [r, in], B [out, r] as PEFT stores them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, read_adapter_config
from model.adapters.folder import Header, read_headers
from model.adapters.names import AdapterTensor, adapter_tensors
from model.architectures.mapping import HeadOrder, Names, Part, WeightMap
from model.config import DecoderConfig
from model.description import read_architecture
from model.errors import CheckpointError, UnsupportedArchitectureError

MAX_RANK = 512
"""Of one module."""
TARGET = re.compile(r"layers\.(\d+)\.(?:attention|mlp)\.(query_key_value|output|gate_up|up|down)\.weight")
FLOATS = ("F32", "BF16", "F16")
MERGE_IT = "serve it merged, with --model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The rows of a layer's projection that a module of the base's is: from `start` to `end`, of `num_outputs`."""

    layer: int
    projection: str
    start: int
    end: int
    num_outputs: int
    num_inputs: int
    order: HeadOrder | None
    """As in `Part`: in which order the module has its rows."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B, by the names under which they are stored, and what their product is multiplied by."""

    place: Place
    a: str
    b: str
    scale: float


def shared_pairs(folder: Path, base: Path) -> list[Pair]:
    """All that an adapter's folder adds to a language model's layers.

    Raises: UnsupportedArchitectureError for what can only be merged, CheckpointError for files that are not what they
    should be; both name the file, and the tensor at fault.
    """
    config = read_adapter_config(folder)
    _check_kind(config)
    raw, name, architecture = read_architecture(base)
    decoder = architecture.configure(raw, None)
    if architecture.head != "language_model" or not isinstance(decoder, DecoderConfig):
        raise UnsupportedArchitectureError(f"{base}: {name} is no decoder that generates; {MERGE_IT}")
    places = _places(decoder, architecture.weights(decoder))
    return _Reading(config, read_headers(folder), places, Names(architecture.weights(decoder))).pairs()


def _check_kind(config: AdapterConfig) -> None:
    if config.decomposed:
        raise _unshared("DoRA changes the length of the base's weights")
    if config.task not in (None, "CAUSAL_LM"):
        raise _unshared(f"task {config.task!r} is no language model's")


def _unshared(what: str, tensor: str | None = None) -> UnsupportedArchitectureError:
    file = ADAPTER_CONFIG if tensor is None else ADAPTER_WEIGHTS
    where = "" if tensor is None else f"tensor {tensor!r} "
    message = f"{file}: {where}{what}, which cannot be computed beside a base that others use: {MERGE_IT}"
    return UnsupportedArchitectureError(message, file=file, tensor=tensor)


def _places(config: DecoderConfig, weights: WeightMap) -> dict[str, Place]:
    """By the name of the stored weight."""
    attended = config.num_heads * config.head_size
    fused = attended + 2 * config.num_kv_heads * config.head_size
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes: Mapping[str, tuple[int, int]] = {
        "query_key_value": (fused, hidden),
        "output": (hidden, attended),
        "gate_up": (2 * inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    found: dict[str, Place] = {}
    for target, sources in weights.parameters.items():
        if match := TARGET.fullmatch(target):
            layer, projection = int(match[1]), match[2]
            start = 0
            for source, rows in zip(sources, _rows(sources, sizes[projection][0]), strict=True):
                found[source.name] = Place(
                    layer=layer,
                    projection=projection,
                    start=start,
                    end=start + rows,
                    num_outputs=sizes[projection][0],
                    num_inputs=sizes[projection][1],
                    order=source.order,
                )
                start += rows
    return found


def _rows(sources: tuple[Part, ...], num_outputs: int) -> list[int]:
    """Those that a part does not say it must have are shared out between such parts."""
    known = sum(source.rows or 0 for source in sources)
    open_parts = sum(source.rows is None for source in sources) or 1
    return [(num_outputs - known) // open_parts if source.rows is None else source.rows for source in sources]


class _Reading:
    """An adapter's tensors, one by one, onto the places of its base."""

    def __init__(
        self, config: AdapterConfig, headers: Mapping[str, Header], places: Mapping[str, Place], names: Names
    ) -> None:
        self._config = config
        self._headers = headers
        self._places = places
        self._names = names

    def pairs(self) -> list[Pair]:
        parts: dict[str, dict[str, str]] = {}
        modules: dict[str, str] = {}
        for stored, meant in adapter_tensors(self._headers).items():
            name = self._names.name(meant.parameter)
            if name not in self._names.known and self._names.are_ignored(name):
                continue
            part = self._part(stored, meant, name)
            other = parts.setdefault(name, {}).setdefault(part, stored)
            if other != stored:
                raise _refused(stored, f"is there as well as {other!r}, which mean the same")
            modules[name] = meant.module
        return [self._pair(self._places[name], modules[name], found) for name, found in parts.items()]

    def _part(self, stored: str, meant: AdapterTensor, name: str) -> str:
        if name not in self._names.known and not meant.parameter.endswith(".bias"):
            raise _refused(stored, "has no place in this architecture")
        if self._headers[stored].kind not in FLOATS:
            raise _refused(stored, f"is not stored as {', '.join(FLOATS)}")
        if meant.part is None:
            raise _unshared("is saved whole", stored)
        if meant.parameter.endswith(".bias"):
            raise _unshared("is a trained bias", stored)
        if name not in self._places:
            raise _unshared("adds to what is no projection of a layer", stored)
        if meant.part not in ("lora_A", "lora_B"):
            raise _refused(stored, "is not of this adapter's kind (use_dora is false?)")
        return meant.part

    def _pair(self, place: Place, module: str, found: Mapping[str, str]) -> Pair:
        if missing := {"lora_A", "lora_B"} - found.keys():
            raise _refused(next(iter(found.values())), f"lacks its {missing.pop()}")
        rank = self._config.rank_of(module)
        if rank > MAX_RANK:
            raise _unshared(f"has rank {rank:,}; at most {MAX_RANK} are computed", found["lora_A"])
        wanted = {"lora_A": (rank, place.num_inputs), "lora_B": (place.end - place.start, rank)}
        for part, shape in wanted.items():
            if self._headers[found[part]].shape != shape:
                has = list(self._headers[found[part]].shape)
                raise _refused(found[part], f"has shape {has}; rank and base ask for {list(shape)}")
        return Pair(place, found["lora_A"], found["lora_B"], self._config.scale(module))


def _refused(tensor: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{ADAPTER_WEIGHTS}: tensor {tensor!r} {reason}", file=ADAPTER_WEIGHTS, tensor=tensor)
