# ruff: noqa: N803 - by Triton's custom its compile-time arguments are written in capitals
"""Paged attention as one Triton kernel: prompts, chunks and single tokens in one launch, for every rule but sinks.

Each program takes a tile of one sequence's queries together with all query heads that share a key head, and walks
over the keys through the block table with the running softmax of arXiv 2205.14135. Where every row computes a single
token and the rows are few, the context is also cut into splits (arXiv 2311.01282), so that the device is still full.
Importing this needs Triton. Runs in the worker process.

Legend: T tokens in the step, B sequences, H query heads, K key/value heads, G = H / K, D head size, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.interface import AttentionRules, PagedLayout
from model.triton_early import registers

KEYS_PER_STEP = 64
PREFILL_ROWS, PREFILL_KEYS, PREFILL_WARPS, PREFILL_STAGES = 64, 32, 4, 2
REGISTERS, FEW_REGISTERS = 255, 128
"""Of a thread; the fewer where a prompt's tile does with them, so that a multiprocessor holds four programs."""
FEW_REGISTERS_TILE = 64 * 128
"""Numbers of 16 bits."""
DECODE_STAGES = 2
MAX_SPLITS = 16
FILLING_PROGRAMS = 512
"""Programs that fill a large GPU: a few for each of its multiprocessors."""


def triton_paged(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
) -> Tensor:
    """query [T, H, D] over caches [num_blocks, block_size, K, D]; returns [T, H, D]."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    decodes = layout.max_query_len == 1
    # The matrix unit wants at least 16 rows: a tile holds (query, head of the group) pairs.
    rows = max(16 if decodes else PREFILL_ROWS, triton.next_power_of_2(group))
    queries = 1 if decodes else rows // group
    tiles = -(-layout.max_query_len // queries)
    programs = len(layout.context_lens) * tiles * num_kv_heads
    splits = num_splits(programs, layout.max_context_len) if decodes else 1
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial = out.new_empty((splits if splits > 1 else 0, num_tokens, num_heads, head_size), dtype=torch.float32)
    weights = out.new_empty(partial.shape[:3], dtype=torch.float32)
    _kernel[(len(layout.context_lens) * tiles, num_kv_heads, splits)](
        out,
        partial,
        weights,
        query,
        key_cache,
        value_cache,
        layout.query_starts,
        layout.context_lens,
        layout.block_tables,
        rules.alibi_slopes,
        rules.relative_bias,
        rules.scale,
        rules.softcap or 0.0,
        rules.window or 0,
        (rules.relative_bias.shape[1] - 1) // 2 if rules.relative_bias is not None else 0,
        num_tokens,
        num_heads,
        tiles,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        layout.block_tables.stride(0),
        G=group,
        D=head_size,
        D_PADDED=max(16, triton.next_power_of_2(head_size)),
        BLOCK_SIZE=key_cache.shape[1],
        ROWS=rows,
        QUERIES=queries,
        KEYS=KEYS_PER_STEP if decodes else PREFILL_KEYS,
        SPLITS=splits,
        CAUSAL=rules.causal,
        WINDOWED=rules.window is not None,
        CAPPED=rules.softcap is not None,
        ALIBI=rules.alibi_slopes is not None,
        BIASED=rules.relative_bias is not None,
        num_warps=4 if decodes else PREFILL_WARPS,
        num_stages=DECODE_STAGES if decodes else PREFILL_STAGES,
        **({} if decodes else registers(query.device, _num_registers(query, rows))),
    )
    if splits > 1:
        _join_splits(out, partial, weights)
    return out


def _num_registers(query: Tensor, rows: int) -> int:
    few = query.element_size() == 2 and rows * triton.next_power_of_2(query.shape[2]) <= FEW_REGISTERS_TILE
    return FEW_REGISTERS if few else REGISTERS


def _join_splits(out: Tensor, partial: Tensor, weights: Tensor) -> None:
    """out [T, H, D] from the splits' results [S, T, H, D] and their log-sum-exp [S, T, H]."""
    splits, num_tokens, num_heads, head_size = partial.shape
    _combine[(num_tokens, num_heads)](
        out,
        partial,
        weights,
        num_tokens * num_heads,
        D=head_size,
        D_PADDED=triton.next_power_of_2(head_size),
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        num_warps=2,
    )


def num_splits(programs: int, max_context_len: int) -> int:
    """Into how many parts each context is cut so that `programs` become enough to fill the device.

    Worked example: 8 programs and contexts up to 4,096 give 16 parts; 256 programs 2; 1,000 are enough as they are.
    """
    wanted = -(-FILLING_PROGRAMS // programs)
    return max(1, min(wanted, MAX_SPLITS, -(-max_context_len // KEYS_PER_STEP)))


@triton.jit
def _kernel(
    out,
    partial,
    weights,
    query,
    key_cache,
    value_cache,
    query_starts,
    context_lens,
    block_tables,
    alibi_slopes,
    relative_bias,
    scale,
    softcap,
    window,
    reach,
    num_tokens,
    num_heads,
    tiles,
    query_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    table_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIBI: tl.constexpr,
    BIASED: tl.constexpr,
):
    sequence = tl.program_id(0) // tiles
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    first = (tl.program_id(0) % tiles) * QUERIES  # the tile's first query in its sequence

    row = tl.arange(0, ROWS)
    place = first + row // G
    head = kv_head * G + row % G
    real = (row < QUERIES * G) & (place < num_queries)
    token = (start + place).to(tl.int64)
    position = context - num_queries + place
    dim = tl.arange(0, D_PADDED)
    within = dim < D

    low, high = keys_of_split(first, num_queries, context, window, split, QUERIES, KEYS, SPLITS, CAUSAL, WINDOWED)
    wanted = place < tl.where(low < high, num_queries, 0)  # an empty split needs no queries
    q = tl.load(
        query + token[:, None] * query_stride + head[:, None] * query_head_stride + dim[None, :],
        mask=(real & wanted)[:, None] & within[None, :],
        other=0.0,
    )
    slope = tl.zeros((ROWS,), tl.float32)
    if ALIBI:
        slope = tl.load(alibi_slopes + head, mask=real, other=0.0)

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, D_PADDED), tl.float32)
    keys = key_cache + kv_head * key_head_stride + dim[:, None]
    values = value_cache + kv_head * value_head_stride + dim[None, :]
    table = block_tables + sequence * table_stride
    # Up to here every query of the tile sees every key.
    open_end = low
    if CAUSAL and not WINDOWED and not ALIBI and not BIASED and QUERIES > 1:
        open_end = tl.maximum(low, tl.minimum(high, context - num_queries + first + 1) // KEYS * KEYS)
        for key_start in range(low, open_end, KEYS):
            key_place = key_start + tl.arange(0, KEYS)
            block = tl.load(table + key_place // BLOCK_SIZE).to(tl.int64)
            slot = key_place % BLOCK_SIZE
            k = _load_within(keys + (block * key_block_stride + slot * key_slot_stride)[None, :], within[:, None])
            v = _load_within(values + (block * value_block_stride + slot * value_slot_stride)[:, None], within[None, :])
            score = score_of(q, k, scale, softcap, CAPPED)
            peak, total, found = add_keys(score, v, peak, total, found)
    for key_start in range(open_end, high, KEYS):
        key_place = key_start + tl.arange(0, KEYS)
        written = key_place < high
        block = tl.load(table + key_place // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        slot = key_place % BLOCK_SIZE
        of_key = keys + (block * key_block_stride + slot * key_slot_stride)[None, :]
        k = _load_within(of_key, written[None, :] & within[:, None])  # [D, keys]
        of_value = values + (block * value_block_stride + slot * value_slot_stride)[:, None]
        v = _load_within(of_value, written[:, None] & within[None, :])  # [keys, D]
        score = score_of(q, k, scale, softcap, CAPPED)
        ahead = key_place[None, :] - position[:, None]
        if ALIBI:
            score += slope[:, None] * ahead
        if BIASED:
            score += _bias(relative_bias, head, ahead, reach, real[:, None] & written[None, :])
        seen = written[None, :] & real[:, None]
        score = tl.where(allowed(ahead, seen, window, CAUSAL, WINDOWED), score, float("-inf"))
        peak, total, found = add_keys(score, v, peak, total, found)

    found = found / tl.where(total > 0, total, 1.0)[:, None]
    target = (token * num_heads + head)[:, None] * D + dim[None, :]
    mask = real[:, None] & within[None, :]
    if SPLITS == 1:
        tl.store(out + target, found.to(out.dtype.element_ty), mask=mask)
    else:
        offset = split.to(tl.int64) * num_tokens * num_heads
        seen = real & (total != 0)  # what is no number is seen, and is none in the end
        tl.store(partial + offset * D + target, found, mask=mask & seen[:, None])
        tl.store(weights + offset + token * num_heads + head, log_sum_exp(peak, total, seen), mask=real)


@triton.jit
def keys_of_split(
    first,
    num_queries,
    context,
    window,
    split,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """(low, high): one split's share, in whole steps of KEYS, of the keys that some query of the tile sees."""
    oldest = context - num_queries + first
    newest = tl.minimum(oldest + QUERIES, context)
    low = 0
    high = context
    if CAUSAL:
        high = newest
    if WINDOWED:
        low = tl.maximum(oldest - window + 1, 0)
        high = tl.minimum(high, newest - 1 + window)
    low = low // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(high - low, KEYS), SPLITS) * KEYS
    low = low + split * share
    high = tl.minimum(high, low + share)
    if first >= num_queries:
        high = low
    return low, high


@triton.jit
def score_of(q, k, scale, softcap, CAPPED: tl.constexpr):
    score = tl.dot(q, k, input_precision="ieee") * scale
    if CAPPED:
        score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    return score


@triton.jit
def _load_within(pointers, mask):
    """Zeros where the mask is not."""
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _bias(relative_bias, head, ahead, reach, mask):
    """[rows, keys]: what the table [H, 2 * reach + 1] adds for each distance; those beyond its ends have its last."""
    column = tl.minimum(tl.maximum(ahead, -reach), reach) + reach
    return tl.load(relative_bias + head[:, None] * (2 * reach + 1) + column, mask=mask, other=0.0)


@triton.jit
def allowed(ahead, seen, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which of the keys a query attends to, [rows, keys]."""
    if CAUSAL:
        seen = seen & (ahead <= 0)
    if WINDOWED:
        seen = seen & (ahead > -window) & (ahead < window)
    return seen


@triton.jit
def _weigh(score, peak):
    """One step of the running softmax: (new peak [rows], weights [rows, keys], how far older sums fade [rows])."""
    higher = tl.maximum(peak, tl.max(score, 1))
    # A row that has seen no key yet has a peak of -inf, and -inf - -inf is no number.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, tl.exp(score - base[:, None]), tl.exp(peak - base)


@triton.jit
def add_keys(score, v, peak, total, found):
    """What there is so far, [rows], [rows] and [rows, D], and some keys more: scores [rows, keys], values [keys, D]."""
    higher, weight, fade = _weigh(score, peak)
    total = total * fade + tl.sum(weight, 1)
    found = found * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return higher, total, found


@triton.jit
def log_sum_exp(peak, total, seen):
    """-inf for a row that has seen no key."""
    return tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), float("-inf"))


@triton.jit
def _combine(
    out,
    partial,
    weights,
    split_stride,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Joins the splits' normalised results [S, T, H, D] by their log-sum-exp [S, T, H]; -inf marks an empty split."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS_PADDED)
    dim = tl.arange(0, D_PADDED)
    weight = tl.load(weights + split * split_stride + place, mask=split < SPLITS, other=float("-inf"))
    peak = tl.max(weight, 0)
    share = tl.exp(weight - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(share, 0)
    share = share / tl.where(total > 0, total, 1.0)
    found = tl.load(
        partial + (split[:, None].to(tl.int64) * split_stride + place) * D + dim[None, :],
        mask=(share > 0)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    tl.store(out + place * D + dim, tl.sum(found * share[:, None], 0).to(out.dtype.element_ty), mask=dim < D)
