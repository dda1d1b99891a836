"""An adapter's weights merged into its base's: W + scale B A, tensor by tensor, in float32, as each is read.

What fills a network reads merged weights as if they were stored so; how the base stores its own (quantized, sharded) is
`model.stored_weights`' business, and what a name means the weight map's. Runs in the worker process.

Legend: r the adapter's rank of a module; A [r, in], B [out, r]; V tokens, E hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.adapters.config import ADAPTER_WEIGHTS, JOINED_FOLDER, AdapterConfig, read_adapter_config
from model.adapters.names import AdapterTensor, adapter_tensors
from model.architectures.mapping import Names, WeightMap
from model.stored_tensors import DTYPES, StoredTensor, StoredTensors
from model.stored_weights import StoredWeights

Read = Callable[[], Tensor]
Merged = tuple[StoredTensor, Read]
"""The header of a tensor as it is to be seen, and what reads and merges it."""


@contextmanager
def open_weights(folder: Path, weight_map: WeightMap) -> Iterator[StoredWeights]:
    """A folder's weights; of a joined folder (`model.adapters.folder`) the base's with the adapter's merged in.

    Raises: CheckpointError, naming the file and the tensor.
    """
    with ExitStack() as stack:
        stored = stack.enter_context(StoredWeights(folder))
        stored.divide(weight_map.divided)
        adapter = folder / JOINED_FOLDER
        if adapter.is_dir():
            files = stack.enter_context(StoredTensors(adapter, single=ADAPTER_WEIGHTS))
            _Merging(stored, files, read_adapter_config(adapter), weight_map).apply()
        yield stored


@dataclass(slots=True)
class _Change:
    """What the adapter has for one parameter: itself, and parts that are added to it."""

    module: str
    whole: StoredTensor | None = None
    parts: dict[str, StoredTensor] = field(default_factory=dict)


class _Merging:
    """Puts a changed tensor in the place of each of the base's that the adapter changes."""

    def __init__(
        self, stored: StoredWeights, files: StoredTensors, config: AdapterConfig, weight_map: WeightMap
    ) -> None:
        self._stored = stored
        self._files = files
        self._config = config
        self._aliases = weight_map.aliases
        self._names = Names(weight_map)
        self._bases = {self._names.name(tensor.name): tensor for tensor in stored}
        """The base's own tensors, by the name that the weight map knows."""
        self._dtype = stored.common_dtype()
        self._changes: dict[str, _Change] = {}

    def apply(self) -> None:
        for name, meant in adapter_tensors(self._files.tensors).items():
            self._gather(self._files.tensors[name], meant)
        changed = {name: self._changed(name, change) for name, change in self._changes.items()}
        tied = self._following(changed) if self._config.keeps_ties else self._kept()
        for name, (header, read) in (changed | tied).items():
            self._stored.put(replace(header, name=name), read, instead_of=self._bases.get(name))

    def _gather(self, tensor: StoredTensor, meant: AdapterTensor) -> None:
        name = self._names.name(meant.parameter)
        if name not in self._names.known:
            if self._names.are_ignored(name):
                return
            raise tensor.refused("has no place in this architecture")
        if tensor.dtype is None:
            raise tensor.refused(f"is not stored as {', '.join(DTYPES)}")
        change = self._changes.setdefault(name, _Change(meant.module))
        other = change.whole if meant.part is None else change.parts.get(meant.part)
        if other is not None:
            raise tensor.refused(f"is there as well as {other.name!r}, which mean the same")
        if meant.part is None:
            change.whole = tensor
        else:
            change.parts[meant.part] = tensor

    def _following(self, changed: Mapping[str, Merged]) -> dict[str, Merged]:
        """Other names of a tied matrix that the adapter changes: they change with it."""
        found: dict[str, Merged] = {}
        for group in self._aliases:
            first = next((name for name in group if name in changed), None)
            base = None if first is None else self._base(first)
            for name in self._names.wanted.intersection(group).difference(changed):
                if first is not None and (name not in self._bases or self._are_same(base, self._bases[name])):
                    found[name] = changed[first]
        return found

    def _are_same(self, one: StoredTensor | None, other: StoredTensor) -> bool:
        if one is None or one.shape != other.shape:
            return False
        return torch.equal(self._stored.read_stored(one), self._stored.read_stored(other))

    def _kept(self) -> dict[str, Merged]:
        """Names of a tied matrix that the adapter leaves alone: they stay the base's when another of its names changes.

        So it is while PEFT trains: a module that is wrapped or copied shares nothing any more with what it was tied to.
        A vocabulary that has grown is no longer the base's, and its matrix stands for all names again.
        """
        kept: dict[str, Merged] = {}
        for group in self._aliases:
            base = next((self._bases[name] for name in group if name in self._bases), None)
            changes = [self._changes[name] for name in group if name in self._changes]
            grown = any(change.whole is not None and base and change.whole.shape != base.shape for change in changes)
            if base is not None and changes and not grown:
                others = self._names.wanted.intersection(group).difference(self._changes, self._bases)
                kept |= dict.fromkeys(others, (base, partial(self._stored.read_stored, base)))
        return kept

    def _changed(self, name: str, change: _Change) -> Merged:
        """What is saved whole counts as stored in the base's dtype, whatever the adapter was trained in."""
        whole = change.whole
        header = self._base(name) if whole is None else replace(whole, dtype=self._dtype)
        first = next(iter(change.parts.values()), change.whole)
        assert first is not None
        if header is None:
            raise first.refused(f"adds to {name!r}, which the base does not have")
        read: Read = partial(self._stored.read_stored, header) if whole is None else partial(self._files.read, whole)
        if not change.parts:
            return header, read
        if name.endswith(".bias"):
            if first.shape != header.shape or change.parts.keys() != {"lora_B"}:
                raise first.refused(f"cannot be added to {name!r}, which has shape {list(header.shape)}")
            return header, partial(self._with_bias, read, first, self._config.scale(change.module))
        return header, self._with_product(header, read, change)

    def _base(self, name: str) -> StoredTensor | None:
        """The base's tensor of that name, or the one that stands for it where they are tied."""
        tied = [other for group in self._aliases if name in group for other in group]
        return next((self._bases[other] for other in (name, *tied) if other in self._bases), None)

    def _with_bias(self, read: Read, added: StoredTensor, scale: float) -> Tensor:
        bias = read().to(torch.float32, copy=True)
        return bias.add_(self._files.read(added).float(), alpha=scale)

    def _with_product(self, header: StoredTensor, read: Read, change: _Change) -> Read:
        embeds = any(part.startswith("lora_embedding") for part in change.parts)
        first, second = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
        wanted = {first, second} | ({"lora_magnitude_vector"} if self._config.decomposed else set())
        some = next(iter(change.parts.values()))
        if missing := sorted(wanted - change.parts.keys()):
            raise some.refused(f"lacks its {' and its '.join(missing)}")
        if extra := sorted(change.parts.keys() - wanted):
            raise change.parts[extra[0]].refused("is not of this adapter's kind (use_dora is false?)")
        a, b, magnitude = change.parts[first], change.parts[second], change.parts.get("lora_magnitude_vector")
        rank, scale = self._config.rank_of(change.module), self._config.scale(change.module)
        for tensor, place in ((a, 0), (b, 1)):
            if len(tensor.shape) != 2 or tensor.shape[place] != rank:
                raise tensor.refused(f"has shape {list(tensor.shape)}; its rank should be {rank}")
        outputs, inputs = b.shape[0], a.shape[1]
        if magnitude is not None and magnitude.shape not in ((outputs,), (1, outputs), (outputs, 1)):
            raise magnitude.refused(f"has shape {list(magnitude.shape)}; its module has {outputs} outputs")
        turned = _is_turned(header, (outputs, inputs), turns=embeds or self._config.inputs_first)
        if turned is None:
            raise b.refused(
                f"makes [{outputs}, {inputs}] with its A; the base's {header.name!r} is {list(header.shape)}"
            )
        return partial(self._merge, read, a, b, magnitude, scale=scale, turned=turned)

    def _merge(
        self,
        read: Read,
        a: StoredTensor,
        b: StoredTensor,
        magnitude: StoredTensor | None,
        *,
        scale: float,
        turned: bool,
    ) -> Tensor:
        """In float32: W + scale B A; with DoRA each output's row at its trained length (arXiv 2402.09353, equation 5).

        An embedding [V, E] counts as turned: lora_embedding_B [E, r] times lora_embedding_A [r, V] is its transpose.
        """
        # A copy: what is read may be the file's own mapping.
        weight = read().to(torch.float32, copy=True)
        rows = weight.T if turned else weight  # [out, in]
        rows.addmm_(self._files.read(b).float(), self._files.read(a).float(), alpha=scale)
        if magnitude is not None:
            lengths = torch.linalg.vector_norm(rows, dim=1)  # [out]
            rows.mul_((self._files.read(magnitude).float().flatten() / lengths)[:, None])
        return weight


def _is_turned(header: StoredTensor, shape: tuple[int, int], *, turns: bool) -> bool | None:
    """Whether a weight is stored as the transpose of [out, in]: by its shape, or where that is square as the adapter
    says; None where it fits neither way."""
    fits = {
        turned: header.shape == (shape[::-1] if turned else shape) and not (turned and header.outputs_first)
        for turned in (False, True)
    }
    return turns if fits[turns] else (not turns if fits[not turns] else None)
