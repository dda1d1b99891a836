"""What attention is asked for and what it is told: the interface between the networks and the attention backends.

A network computes queries, keys and values and calls an `Attend`; where keys and values are kept (the paged cache, or
nowhere) and which kernel reads them is not its business. Runs in the worker process.

Legend: T tokens packed in the step, B sequences, H query heads, K key/value heads (H is a multiple of K), D head size,
N blocks in the longest block table.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRules:
    """Who may look at whom, and how scores are shaped; constant for a layer."""

    scale: float
    causal: bool = True
    window: int | None = None
    """Sliding window: a query at position i sees keys at positions > i - window (and, not causal, < i + window)."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118)."""
    alibi_slopes: Tensor | None = None
    """[H] float32: slope * (j - i) is added to the score of key j for query i (arXiv 2108.12409)."""
    relative_bias: Tensor | None = None
    """[H, 2R + 1] float32: relative_bias[h, clamp(j - i, -R, R) + R] is added (T5, MPNet)."""
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedLayout:
    """Where each sequence's tokens are in the packed step and in the paged cache.

    Worked example, blocks of 4: sequence A computes its positions 4 and 5 (context 6, blocks [7, 2]), sequence B its
    position 0 (context 1, block [3]): query_starts = [0, 2, 3], context_lens = [6, 1], block_tables = [[7, 2], [3, 0]],
    slots = [2 * 4 + 0, 2 * 4 + 1, 3 * 4 + 0].
    """

    query_starts: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32: readable tokens once this step's keys and values are written
    block_tables: Tensor  # [B, N] int32, rows padded with 0
    slots: Tensor  # [T] int64
    max_query_len: int
    max_context_len: int
    prepared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a backend derived from this layout in the first layer, for the layers after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Sequences laid end to end without padding and without a cache (encoders, embedders)."""

    starts: Tensor  # [B + 1] int32
    max_len: int
    prepared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


class Attend(Protocol):
    """Attention of one layer over whatever context the caller arranged."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        """query [T, H, D], key and value [T, K, D] of this step's tokens; returns [T, H, D]."""
        ...


class CrossAttend(Protocol):
    """Cross-attention of one decoder layer over its sequence's encoded source."""

    def __call__(self, layer: int, query: Tensor, rules: AttentionRules) -> Tensor:
        """query [T, H, D]; returns [T, H, D]."""
        ...


class AttentionBackend(Protocol):
    """The kernels. `reference` is the law; every other backend is tested against it."""

    def paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
    ) -> Tensor:
        """query [T, H, D] over caches [num_blocks, block_size, K, D] (this step's keys are already written).

        Query t of a sequence with n query rows sits at position context_len - n + t. Returns [T, H, D].
        """
        ...

    def packed(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rules: AttentionRules) -> Tensor:
        """query [T, H, D], key and value [T, K, D], each sequence for itself. Returns [T, H, D]."""
        ...

    def write(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, rules: AttentionRules
    ) -> None:
        """Stores key and value [T, K, D] at `slots` [T] of the caches, in place.

        How they lie in a block is the backend's own matter, and may depend on the rules that they are read by.
        """
        ...
