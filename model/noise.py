"""Sampling noise as a pure function: one uniform number per (seed, position), no generator and no state.

So a row's tokens do not depend on what else is in the batch, and a replayed or preempted sequence goes on exactly.
Runs in the worker process; numpy only.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def seed_bits(seed: int) -> int:
    """Any integer as 64 unsigned bits; negative seeds wrap."""
    return seed & _MASK


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position).

    Two rounds of splitmix64's finalizer (Steele, Lea, Flood 2014), the seed mixed before the position enters, so that
    seed 1 at position 5 has nothing to do with seed 5 at position 1. The upper 53 bits make the fraction.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
