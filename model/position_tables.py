"""Positions without learned tables: the two families of sines and cosines, and T5's buckets of distances.

Each is made to give the numbers that the checkpoints were trained with, down to the order of operations. Pure
functions of shapes and distances; knows no network. Runs in the worker process.

Legend: P positions, E hidden size.
"""

import math

import numpy as np
import torch
from torch import Tensor


def marian_table(num_positions: int, size: int) -> Tensor:
    """[P, E] float32: sines in the first half, cosines in the second (arXiv 1706.03762, section 3.5, not interleaved).

    Marian's and Pegasus' table, computed in float64 as theirs was.
    """
    powers = np.power(10000.0, 2 * (np.arange(size) // 2) / size)
    angles = np.arange(num_positions)[:, None] / powers
    table = np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1)
    return torch.from_numpy(table).float()


def tensor2tensor_table(num_positions: int, size: int) -> Tensor:
    """[P, E] float32: the variant of tensor2tensor, whose last frequency is exactly 1/10000 (M2M100, NLLB)."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(num_positions).float().unsqueeze(1) * frequencies  # [P, E / 2]
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(num_positions, size % 2)], dim=1)


def relative_buckets(distances: Tensor, num_buckets: int, max_distance: int, *, two_sided: bool) -> Tensor:
    """T5's bucket of each distance (key position - query position), same shape (arXiv 1910.10683, section 2.1).

    Small distances have a bucket each, larger ones share buckets that widen logarithmically up to `max_distance`, past
    which all share the last. Two-sided: half of the buckets are for keys after the query; else those count as 0.
    """
    if two_sided:
        num_buckets //= 2
        base = (distances > 0).long() * num_buckets
        lengths = distances.abs()
    else:
        base = torch.zeros_like(distances)
        lengths = (-distances).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(lengths.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return base + torch.where(lengths < exact, lengths, wide)
