"""What an architecture's file says: how `config.json` becomes a config, and which stored tensors fill which parameter.

Plain data, no tensors: `model.checkpoint` reads it in the worker and does the work; `model.description` reads the rest
in the API process.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from model.architectures.raw import RawConfig

Network = Literal["decoder", "encoder", "encoder_decoder"]
Head = Literal[
    "language_model",
    "embedding",
    "sparse_embedding",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "cross_encoder",
]


class NetworkConfig(Protocol):
    """What the three configs have in common."""

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


Config = TypeVar("Config", bound=NetworkConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOrder:
    """How the rows of a projection to heads lie in a file, where that is not as ours do: queries, keys, values, and of
    a head's rotated dimensions those that turn together half of them apart.

    Worked example of `heads`: GPT-NeoX stores queries, keys and values head by head; with 2 heads of size 1 the stored
    rows q0 k0 v0 q1 k1 v1 become q0 q1 k0 k1 v0 v1 by (0, 3, 1, 4, 2, 5). Of `paired`: where 4 dimensions are rotated
    in pairs of neighbours (GPT-J), a head's rows a b c d e become a c b d e.
    """

    head_size: int
    heads: tuple[int, ...] = ()
    """Which of the stored heads each of ours is; empty: they lie as ours."""
    paired: int = 0
    """How many dimensions of a head, the first ones, are stored with those side by side that turn together."""
    num_paired_heads: int | None = None
    """Of how many heads, ours, from the first one; None: of all."""


def grouped_heads(num_heads: int, num_groups: int) -> tuple[int, ...]:
    """`HeadOrder.heads` where a group's queries are followed by its key and its value."""
    size = num_heads // num_groups
    queries = [group * (size + 2) + head for group in range(num_groups) for head in range(size)]
    keys, values = ([group * (size + 2) + size + which for group in range(num_groups)] for which in (0, 1))
    return (*queries, *keys, *values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stored tensor as it goes into a parameter."""

    name: str
    transposed: bool = False
    """Stored as [in, out] (GPT-2's Conv1D)."""
    order: HeadOrder | None = None
    flattened: bool = False
    """Stored with a dimension for the heads, which the parameter does not have (Cohere's norms)."""
    matrix: tuple[int, int] | None = None
    """Which of how many matrices of the stored tensor, where they lie one behind the other (Granite's experts)."""
    rows: int | None = None
    """Rows it must have; needed to tell which of several parts has the wrong shape, or to leave one out (`zeros`)."""


def part(name: str) -> tuple[Part, ...]:
    """A parameter that is one stored tensor, unchanged."""
    return (Part(name=name),)


def parts(*names: str) -> tuple[Part, ...]:
    """A parameter that is several stored tensors one below the other."""
    return tuple(Part(name=name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Where each parameter of a network comes from.

    Names are the stored ones after two normalisations: `renamed` replaces old substrings by new ones (in order), and
    `prefix` is put before a stored name that lacks it, if the result is one that is looked for (checkpoints of the
    bare network, saved without its head, have no prefix).
    """

    parameters: dict[str, tuple[Part, ...]]
    ignored: tuple[str, ...] = ()
    """Regular expressions (matched from the start to the end) of stored names that may be there and are not used."""
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, ...], ...] = ()
    """Groups of stored names that mean one tensor: those of a group that are stored, the first before the others, stand
    for those that are not, and for those that hold the same numbers. (Savers keep any one name of a tied matrix, or
    all; where they hold different numbers, the config that ties them is wrong, as transformers 5 sees it.)"""
    divided: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Ends of stored modules' names, and of those whose rows, equally many of each, lie in them one below the other:
    what the authors of a checkpoint fused and the names that are asked for (an adapter's, say) have apart."""
    wide: frozenset[str] = frozenset()
    """Parameters that stay in float32 whatever the network's dtype is."""
    zeros: tuple[str, ...] = ()
    """Stored names that may be missing and are zeros then."""


class Names:
    """What a weight map says of names: which are asked for, and how a stored one becomes one of them."""

    def __init__(self, weight_map: WeightMap) -> None:
        self.wanted = frozenset(part.name for sources in weight_map.parameters.values() for part in sources)
        self.known = self.wanted.union(*weight_map.aliases)
        """Those, and whatever else the same tensors may be called."""
        self._renamed = weight_map.renamed
        self._prefix = weight_map.prefix
        self._ignored = re.compile("|".join(f"(?:{pattern})" for pattern in weight_map.ignored) or r"(?!)")

    def name(self, stored: str) -> str:
        """A stored name as the weight map has it; as it is where that knows none like it."""
        for old, new in self._renamed:
            stored = stored.replace(old, new)
        return self._prefix + stored if stored not in self.known and self._prefix + stored in self.known else stored

    def are_ignored(self, name: str) -> bool:
        return self._ignored.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture(Generic[Config]):
    """A row of the table. `configure` takes the raw config and the caller's context limit (None: as trained)."""

    network: Network
    head: Head
    configure: Callable[[RawConfig, int | None], Config]
    weights: Callable[[Config], WeightMap]
