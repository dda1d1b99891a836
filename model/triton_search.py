# ruff: noqa: N803 - by Triton's custom its compile-time arguments are written in capitals
"""The choice of a token among all of a vocabulary as one Triton kernel, for the rows that few candidates do not decide.

`candidates` says the law: the inverse of the cumulated distribution in the order weight descending, id ascending.
Nothing is sorted: float32 weights from 0 to 1 order as their bits do, so the weight at which a count or a mass is
reached is found by its bits, and only tokens of that very weight are told apart by their ids. Masses are sums of
integers, so a row's do not depend on its company; what weighs less than 2^-40 of the heaviest counts as nothing.
Importing this needs Triton. Runs in the worker process.

Legend: R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_STEP = 2048
STAGES = tl.constexpr(3)


def triton_search(
    weights: Tensor, noise: Tensor, filters: tuple[Tensor, Tensor, Tensor], tokens: Tensor, decided: Tensor
) -> Tensor:
    """tokens [R], those replaced that are not `decided`; weights float32 [R, V], each row's largest 1.

    `filters` are top_k int64, top_p and min_p float64, [R] each.
    """
    found = torch.empty_like(tokens)
    top_k, top_p, min_p = filters
    _kernel[(len(weights),)](
        found,
        weights,
        weights.stride(0),
        noise,
        top_k,
        top_p,
        min_p,
        tokens,
        decided,
        weights.shape[1],
        BLOCK=TOKENS_PER_STEP,
        num_warps=16,
    )
    return found


@triton.jit
def _fixed(weight):
    """A weight in units of 2^-40: the sum over any vocabulary is exact, whatever its order."""
    return (weight * 1099511627776.0).to(tl.int64)


@triton.jit
def _mass(row, size, least, BLOCK: tl.constexpr):
    """The mass of the tokens whose weights' bits are at least `least`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        weight = tl.load(row + place, mask=place < size, other=0.0)
        total += tl.where(weight.to(tl.int32, bitcast=True) >= least, _fixed(weight), 0)
    return tl.sum(total)


@triton.jit
def _mass_at_least(row, size, least, BLOCK: tl.constexpr):
    """The mass of the tokens whose weights are at least the float64 `least`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        weight = tl.load(row + place, mask=place < size, other=0.0)
        total += tl.where(weight.to(tl.float64) >= least, _fixed(weight), 0)
    return tl.sum(total)


@triton.jit
def _weight_reaching(row, size, wanted, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the largest weight such that it and all heavier ones together have at least the mass `wanted`, or
    are so many. No weight is above 1, so its bits are 30, found three at a time."""
    found = 0
    digit = tl.arange(0, 8)
    for step in range(10):
        candidate = found | (digit << (27 - 3 * step))
        total = tl.zeros((8, BLOCK), tl.int64)
        for start in tl.range(0, size, BLOCK, num_stages=STAGES):
            place = start + tl.arange(0, BLOCK)
            weight = tl.load(row + place, mask=place < size, other=-1.0)
            amount = tl.full((BLOCK,), 1, tl.int64) if COUNTS else _fixed(weight)
            heavy = weight.to(tl.int32, bitcast=True)[None, :] >= candidate[:, None]
            total += tl.where(heavy, amount[None, :], 0)
        reached = tl.sum(total, 1) >= wanted
        found = found | (tl.maximum(tl.sum(reached.to(tl.int32)) - 1, 0) << (27 - 3 * step))
    return found


@triton.jit
def _kernel(
    found,
    weights,
    row_stride,
    noise,
    top_ks,
    top_ps,
    min_ps,
    tokens,
    decided,
    size,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    token = tl.load(tokens + index)
    if tl.load(decided + index) == 0:
        row = weights + index.to(tl.int64) * row_stride
        # The mass that is kept: each filter keeps a leading part, so the shortest of them is what all keep.
        top_k = tl.load(top_ks + index)
        kth = 0
        if (top_k > 0) & (top_k < size):
            kth = _weight_reaching(row, size, top_k, True, BLOCK)
        kept = _mass(row, size, kth, BLOCK)
        top_p = tl.load(top_ps + index)
        if top_p < 1.0:
            wanted = tl.maximum(tl.ceil(top_p * kept.to(tl.float64)).to(tl.int64), 1)
            last = _weight_reaching(row, size, wanted, False, BLOCK)
            heavier = _mass(row, size, last + 1, BLOCK)
            each = _fixed(last.to(tl.float32, bitcast=True))
            kept = heavier + tl.cdiv(wanted - heavier, each) * each
        min_p = tl.load(min_ps + index)
        if min_p > 0.0:
            kept = tl.minimum(kept, _mass_at_least(row, size, min_p, BLOCK))
        # The first token that brings the mass past the target: at least the next integer.
        target = tl.minimum((tl.load(noise + index) * kept.to(tl.float64)).to(tl.int64), kept - 1)
        chosen = _weight_reaching(row, size, target + 1, False, BLOCK)
        each = _fixed(chosen.to(tl.float32, bitcast=True))
        rank = (target - _mass(row, size, chosen + 1, BLOCK)) // each
        before = tl.zeros((), tl.int64)
        for start in tl.range(0, size, BLOCK, num_stages=STAGES):
            place = start + tl.arange(0, BLOCK)
            weight = tl.load(row + place, mask=place < size, other=-1.0)
            same = (weight.to(tl.int32, bitcast=True) == chosen).to(tl.int64)
            here = (same == 1) & (before + tl.cumsum(same) - 1 == rank)
            hits = tl.sum(here.to(tl.int64))
            token = tl.where(hits > 0, tl.sum(tl.where(here, place, 0).to(tl.int64)), token)
            before += tl.sum(same)
    tl.store(found + index, token)
