"""How many bytes of KV cache a checkpoint gets where nobody has said: all that are loaded together share what there is.

What is yet to be loaded is reckoned with before it comes, or the first checkpoint would take a GPU for itself. Knows
folders, not networks. Runs in the worker process, on its loader thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.adapters.config import ADAPTER_WEIGHTS
from model.description import describe
from model.errors import CheckpointError
from model.stored_weights import StoredWeights
from service.engine.joined_folders import folder_of
from service.engine.protocol import ModelSpec

CPU_CACHE_BYTES = 1 << 30
"""On CPUs, where nobody can say how much memory is meant to be used."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The checkpoints that are loaded with one: those before it and those that are yet to come."""

    earlier: tuple[ModelSpec, ...] = ()
    later: tuple[ModelSpec, ...] = ()

    @classmethod
    def of(cls, specs: Sequence[ModelSpec], place: int) -> "Neighbours":
        return cls(tuple(specs[:place]), tuple(specs[place + 1 :]))

    def cpu_share(self) -> int:
        return CPU_CACHE_BYTES // (1 + _num_sharing((*self.earlier, *self.later)))

    def gpu_share(self, free_bytes: int) -> int:
        """A share of what is free now: those that come later need their weights, and caches of their own.

        Worked example: 60 GB are free; an encoder of 2 GB and a language model of 8 GB are to come. 50 GB are left for
        two caches: 25 GB.
        """
        reserved = sum(_reserved_bytes(spec) for spec in self.later)
        return max(free_bytes - reserved, 0) // (1 + _num_sharing(self.later))


ALONE = Neighbours()


def _num_sharing(specs: Sequence[ModelSpec]) -> int:
    return sum(spec.kv_cache_bytes is None and _generates(spec) for spec in specs)


def _generates(spec: ModelSpec) -> bool:
    """A folder that is not what it should be will not be loaded, and needs nothing. An adapter that shares its base has
    no cache of its own."""
    if spec.shares is not None:
        return False
    try:
        with folder_of(spec) as folder:
            return describe(folder).head == "language_model"
    except CheckpointError:
        return False


def _reserved_bytes(spec: ModelSpec) -> int:
    """Weights as a GPU holds them (8 bits are reckoned as 16), and the cache that was asked for; twice what
    the file of an adapter has that shares its base, for what is padded."""
    if spec.shares is not None:
        path = Path(spec.folder) / ADAPTER_WEIGHTS
        return 2 * path.stat().st_size if path.is_file() else 0
    itemsize = 4 if spec.dtype == "float32" else 2
    try:
        with folder_of(spec) as folder, StoredWeights(folder) as stored:
            num_values = sum(entry.num_bytes // (entry.dtype.itemsize if entry.dtype else 1) for entry in stored)
    except CheckpointError:
        return 0
    return itemsize * num_values + (spec.kv_cache_bytes or 0)
