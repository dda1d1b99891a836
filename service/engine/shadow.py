"""Two versions at the same request: whether the shadow's answer is the one that the caller got.

Hears of the ends of both flights; never delays or fails the caller's. Pure logic. API process only.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.engine.flight import ENDED_WELL, EncodeFlight, Flight, GenerateFlight
from service.engine.protocol import EncodeResult

SHADOW_PRIORITY = -1_000_000
SHADOW_CLIENT = "(shadow)"
TOLERANCE = 1e-3
"""Relative and absolute: two checkpoints of one network differ by more, two dtypes of one checkpoint may not."""

ShadowOutcome = Literal["same", "different", "failed", "skipped"]


class Comparison:
    """Of a flight and its shadow, from the moment both are under way."""

    def __init__(
        self,
        original: Flight,
        shadow: Flight,
        *,
        count: Callable[[ShadowOutcome], None],
        cancel: Callable[[Flight], None],
    ) -> None:
        self._original = original
        self._shadow = shadow
        self._count = count
        self._cancel = cancel
        original.on_end = shadow.on_end = self.ended

    def ended(self, flight: Flight) -> None:
        """One of the two has ended; the second one settles it, and a caller without an answer cancels the shadow."""
        flight.on_end = None  # what has ended holds nothing
        if flight is self._original and flight.outcome not in ENDED_WELL:
            if self._shadow.outcome is None:
                self._shadow.on_end = None
                self._cancel(self._shadow)
        elif self._shadow.outcome is not None and self._shadow.outcome not in ENDED_WELL:
            self._original.on_end = None
            self._count("failed")
        elif self._original.outcome is not None and self._shadow.outcome is not None:
            self._count("same" if agree(self._original, self._shadow) else "different")


def agree(original: Flight, shadow: Flight) -> bool:
    """Whether two flights that ended well gave the same.

    A text that a stop string ended, which only the caller's side knows, is compared as far as it went.
    """
    if isinstance(original, GenerateFlight) and isinstance(shadow, GenerateFlight):
        ids, others = original.delivered_ids, shadow.delivered_ids
        if original.stopped_here:
            return others[: len(ids)] == ids[: len(others)]
        return ids == others
    if isinstance(original, EncodeFlight) and isinstance(shadow, EncodeFlight):
        close = _close_entries if original.request.output == "sparse_embedding" else _close
        return all(
            one is not None and other is not None and (one.error is None) == (other.error is None) and close(one, other)
            for one, other in zip(original.results, shadow.results, strict=True)
        )
    return False


def _close(one: EncodeResult, other: EncodeResult) -> bool:
    return one.shape == other.shape and _alike(_numbers(one), _numbers(other))


def _close_entries(one: EncodeResult, other: EncodeResult) -> bool:
    """Two sparse vectors by their entries: an id that only one of them has weighs 0 in the other, so that a weight
    that rounding takes to 0, or from it, makes no difference.

    Worked example: [[5, 9], [0.5, 0.0004]] and [[5], [0.5]] are alike: of the ids 5 and 9 the weights are
    [0.5, 0.0004] and [0.5, 0].
    """
    (ids, weights), (other_ids, other_weights) = _numbers(one).reshape(2, -1), _numbers(other).reshape(2, -1)
    every = np.union1d(ids, other_ids)
    values, others = np.zeros_like(every), np.zeros_like(every)
    values[np.searchsorted(every, ids)] = weights
    others[np.searchsorted(every, other_ids)] = other_weights
    return _alike(values, others)


def _numbers(result: EncodeResult) -> NDArray[np.float32]:
    return np.frombuffer(result.data, dtype="<f4")


def _alike(values: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    return bool(np.allclose(values, others, rtol=TOLERANCE, atol=TOLERANCE))
