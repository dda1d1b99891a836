# ruff: noqa: N803 - by Triton's custom its compile-time arguments are written in capitals
"""Attention of a single row over the paged cache, from its projection to what the output projection takes: one kernel.

Heads are normed and turned, the key and the value go to the cache, the context is attended to in splits (arXiv
2311.01282), and whichever program of a key head is done last joins them. For causal rules with windows and capped
scores. Importing this needs Triton. Runs in the worker process.

Legend: H query heads, K key/value heads, G = H / K, D head size, R rotated dimensions of a head, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.interface import AttentionRules, PagedLayout
from model.attention.triton_paged import add_keys, allowed, keys_of_split, log_sum_exp, num_splits, score_of
from model.triton_early import early_start, let_next_start, registers, wait_for_previous
from model.triton_layers import HeadNorm, head_weight

KEYS_PER_STEP, FEW_KEYS_PER_STEP = 64, 32
"""The fewer where a key has 512 bytes or more: those of the next step are fetched into registers."""
REGISTERS = 255
MAX_GROUP = 31
"""A tile holds the query heads of a key head and the key itself."""


def serves(rules: AttentionRules, num_heads: int, num_kv_heads: int) -> bool:
    """Whether the kernel knows the rules, and its tiles hold the heads."""
    plain = (rules.alibi_slopes, rules.relative_bias, rules.sinks) == (None, None, None)
    return plain and rules.causal and num_heads // num_kv_heads <= MAX_GROUP


def attend_one_row(
    fused: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: PagedLayout,
    rules: AttentionRules,
    arrived: Tensor,
) -> Tensor:
    """fused [1, H + 2K, D], as projected; caches [num_blocks, block_size, K, D]; returns [1, H, D].

    `rotation` as in `layers.rotate`. `arrived` [K] int32 are zeros, before and after.
    """
    _, block_size, num_kv_heads, size = key_cache.shape
    num_heads = fused.shape[1] - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    splits = num_splits(num_kv_heads, layout.max_context_len)
    out = torch.empty((1, num_heads, size), dtype=fused.dtype, device=fused.device)
    partial = out.new_empty((splits if splits > 1 else 0, num_heads, size), dtype=torch.float32)
    weights = out.new_empty(partial.shape[:2], dtype=torch.float32)
    cos, sin = rotation if rotation is not None else (fused, fused)
    query_weight, key_weight, epsilon, offset = norm if norm is not None else (fused, fused, 0.0, 0.0)
    padded = max(16, triton.next_power_of_2(size))
    early = early_start(fused.device)
    _attend[(num_kv_heads, splits)](
        out,
        partial,
        weights,
        arrived,
        fused,
        cos,
        sin,
        query_weight,
        key_weight,
        epsilon,
        offset,
        key_cache,
        value_cache,
        layout.slots,
        layout.context_lens,
        layout.block_tables,
        rules.scale,
        rules.softcap or 0.0,
        rules.window or 0,
        K=num_kv_heads,
        G=group,
        D=size,
        D_PADDED=padded,
        R=cos.shape[-1] if rotation is not None else 0,
        NORMS=norm is not None,
        BLOCK_SIZE=block_size,
        ROWS=max(16, triton.next_power_of_2(group + 1)),
        KEYS=KEYS_PER_STEP if padded * key_cache.element_size() < 512 else FEW_KEYS_PER_STEP,
        SPLITS=splits,
        WINDOWED=rules.window is not None,
        CAPPED=rules.softcap is not None,
        EARLY=bool(early),
        num_warps=4,
        **registers(fused.device, REGISTERS),
        **early,
    )
    return out


@triton.jit
def _attend(
    out,
    partial,
    weights,
    arrived,
    fused,
    cos,
    sin,
    query_weight,
    key_weight,
    epsilon,
    offset,
    key_cache,
    value_cache,
    slots,
    context_lens,
    block_tables,
    scale,
    softcap,
    window,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    R: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    EARLY: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D_PADDED)
    within = dim < D
    # The step's places and the older keys and values were there before the step's first kernel, which starts in turn.
    context = tl.load(context_lens)
    newest = context - 1
    low, high = keys_of_split(0, 1, context, window, split, 1, KEYS, SPLITS, True, WINDOWED)
    k, v = _older(key_cache, value_cache, block_tables, low, high, newest, kv_head, K, D, D_PADDED, BLOCK_SIZE, KEYS)
    if EARLY:
        let_next_start()
        wait_for_previous()

    # The group's query heads, and behind them the key.
    head = tl.where(row < G, kv_head * G + row, K * G + kv_head)
    turned = _turned(
        fused, head, row <= G, row < G, cos, sin, query_weight, key_weight, epsilon, offset, D, D_PADDED, R, NORMS
    ).to(fused.dtype.element_ty)
    own_key = tl.sum(tl.where((row == G)[:, None], turned.to(tl.float32), 0.0), 0).to(k.dtype)
    own_value = tl.load(fused + (K * G + K + kv_head) * D + dim, mask=within, other=0.0).to(v.dtype)
    if split == 0:
        target = (tl.load(slots) * K + kv_head) * D + dim
        tl.store(key_cache + target, own_key, mask=within)
        tl.store(value_cache + target, own_value, mask=within)

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, D_PADDED), tl.float32)
    q = turned.to(k.dtype)
    for key_start in range(low, high, KEYS):
        place = key_start + tl.arange(0, KEYS)
        k = tl.where((place == newest)[None, :], own_key[:, None], k)
        v = tl.where((place == newest)[:, None], own_value[None, :], v)
        score = score_of(q, k, scale, softcap, CAPPED)
        ahead = (place - newest)[None, :] + tl.zeros((ROWS, 1), tl.int32)
        seen = (place < high)[None, :] & (row < G)[:, None]
        score = tl.where(allowed(ahead, seen, window, True, WINDOWED), score, float("-inf"))
        peak, total, found = add_keys(score, v, peak, total, found)
        k, v = _older(
            key_cache, value_cache, block_tables, key_start + KEYS, high, newest, kv_head, K, D, D_PADDED, BLOCK_SIZE,
            KEYS,
        )  # fmt: skip

    found = found / tl.where(total > 0, total, 1.0)[:, None]
    target = (kv_head * G + row)[:, None] * D + dim[None, :]
    mask = (row < G)[:, None] & within[None, :]
    if SPLITS == 1:
        tl.store(out + target, found.to(out.dtype.element_ty), mask=mask)
    else:
        seen = (row < G) & (total != 0)  # what is no number is seen, and is none in the end
        tl.store(partial + split * (K * G * D) + target, found, mask=mask & seen[:, None])
        tl.store(weights + split * (K * G) + kv_head * G + row, log_sum_exp(peak, total, seen), mask=row < G)
        tl.debug_barrier()
        if tl.atomic_add(arrived + kv_head, 1) == SPLITS - 1:
            tl.store(arrived + kv_head, 0)
            joined = _joined(partial, weights, kv_head, target, mask, row, K, G, D, D_PADDED, ROWS, SPLITS)
            tl.store(out + target, joined.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _older(
    key_cache,
    value_cache,
    block_tables,
    start,
    high,
    newest,
    kv_head,
    K: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """(keys [D, KEYS], values [KEYS, D]) that earlier steps have written, from position `start` on; zeros elsewhere."""
    dim = tl.arange(0, D_PADDED)
    place = start + tl.arange(0, KEYS)
    written = (place < high) & (place < newest)
    block = tl.load(block_tables + place // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
    begin = ((block * BLOCK_SIZE + place % BLOCK_SIZE) * K + kv_head) * D
    k = tl.load(key_cache + begin[None, :] + dim[:, None], mask=written[None, :] & (dim < D)[:, None], other=0.0)
    v = tl.load(value_cache + begin[:, None] + dim[None, :], mask=written[:, None] & (dim < D)[None, :], other=0.0)
    return k, v


@triton.jit
def _turned(
    fused,
    head,
    real,
    is_query,
    cos,
    sin,
    query_weight,
    key_weight,
    epsilon,
    offset,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    R: tl.constexpr,
    NORMS: tl.constexpr,
):
    """[ROWS, D] float32: heads of the projection, normed each for itself and turned."""
    place = tl.arange(0, D_PADDED)[None, :]
    begin = fused + head[:, None] * D
    mask = real[:, None] & (place < D)
    own = tl.load(begin + place, mask=mask, other=0.0).to(tl.float32)
    # Dimension i < R / 2 is turned with i + R / 2.
    partner = tl.where(place < R // 2, place + R // 2, place - R // 2)
    rotated = place < R
    other = tl.load(begin + partner, mask=mask & rotated, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + epsilon)[:, None]
        own = own * scale * (head_weight(query_weight, key_weight, is_query[:, None], place, place < D) + offset)
        other = other * scale * (head_weight(query_weight, key_weight, is_query[:, None], partner, rotated) + offset)
    if R > 0:
        c = tl.load(cos + place, mask=rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + place, mask=rotated, other=0.0).to(tl.float32)
        own = own * c + other * s
    return own


@triton.jit
def _joined(
    partial,
    weights,
    kv_head,
    target,
    mask,
    row,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """[ROWS, D]: the splits' normalised results, by their log-sum-exp; -inf marks an empty split."""
    # Other multiprocessors wrote these a moment ago: they are read past the first cache, which does not know.
    places = weights + kv_head * G + row
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.load(places + split * (K * G), mask=row < G, other=float("-inf"), cache_modifier=".cg")
        peak = tl.maximum(peak, weight)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((ROWS,), tl.float32)
    joined = tl.zeros((ROWS, D_PADDED), tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.load(places + split * (K * G), mask=row < G, other=float("-inf"), cache_modifier=".cg")
        share = tl.exp(weight - peak)
        there = mask & (share > 0)[:, None]
        found = tl.load(partial + split * (K * G * D) + target, mask=there, other=0.0, cache_modifier=".cg")
        total += share
        joined += found * share[:, None]
    return joined / tl.where(total > 0, total, 1.0)[:, None]
