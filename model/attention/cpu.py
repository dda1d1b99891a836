"""Attention on CPUs: the compiled operators where they serve, else few large calls of PyTorch's fused attention.

Heads and blocks of the usual sizes have one operator for all that a bfloat16 step asks. For others, rows that compute
one token are gathered block by block into padded batches of like length, and prompts run one by one, in slices of
queries that only read the keys they can see. Encoders' sequences run in padded batches (`padded`).
What depends on the layout alone is worked out in the first layer and kept in `layout.prepared`.
Knows neither networks nor scheduler. Runs in the worker process.

Legend: T tokens in the step, B sequences, L keys (padded), H query heads, K key/value heads, G = H / K, D head size.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from model.attention.interface import AttentionRules, PackedLayout, PagedLayout
from model.attention.padded import (
    fused_attention,
    groups_of_like_length,
    kept_mask,
    mask_dtype,
    mask_for,
    padded_attention,
)
from model.attention.reference import ReferenceAttention, score_bias, visible
from model.ops import library

QUERY_SLICE = 256
"""Queries of a long prompt that share one mask: bounds its size and skips the keys that none of them sees."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one query each with contexts of like length."""

    tokens: Tensor  # [B] int64: where the rows' queries are in the step
    blocks: Tensor  # [B * N] int64
    context_lens: Tensor  # [B] int64
    padded_len: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of several queries."""

    start: int
    end: int
    context_len: int
    blocks: Tensor  # [N] int64


class CpuAttention:
    """`AttentionBackend` on PyTorch's fused CPU attention; attention sinks are left to the reference."""

    def __init__(self, *, deterministic: bool = False) -> None:
        """`deterministic` takes the compiled operator also where it is slow: neither the batch nor the chunk that a
        query came in matters to it, to a bit."""
        self._reference = ReferenceAttention()
        self._deterministic = deterministic

    def write(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, rules: AttentionRules
    ) -> None:
        if self._reads_in_place(key_cache, rules):
            torch.ops.slimpajama.store(_with_whole_rows(key), _with_whole_rows(value), key_cache, value_cache, slots)
            return
        self._reference.write(key, value, key_cache, value_cache, slots, rules)

    def paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
    ) -> Tensor:
        if rules.sinks is not None:
            return self._reference.paged(query, key_cache, value_cache, layout, rules)
        if self._reads_in_place(key_cache, rules):
            return _compiled(_with_whole_rows(query), key_cache, value_cache, layout, rules)
        if "paged" not in layout.prepared:
            layout.prepared["paged"] = _paged_plan(layout, key_cache.shape[1])
        groups, prompts = layout.prepared["paged"]
        out = torch.empty(query.shape, dtype=query.dtype)
        for index, group in enumerate(groups):
            mask = kept_mask(
                layout, index, rules, partial(_decode_mask, group, rules, mask_dtype(query), key_cache.shape[2])
            )
            out.index_copy_(0, group.tokens, _decode(query, key_cache, value_cache, group, mask, rules))
        for prompt in prompts:
            key = _gather(key_cache, prompt.blocks).flatten(0, 1)[: prompt.context_len]  # [L, K, D]
            value = _gather(value_cache, prompt.blocks).flatten(0, 1)[: prompt.context_len]
            out[prompt.start : prompt.end] = _prompt(query[prompt.start : prompt.end], key, value, rules)
        return out

    def _reads_in_place(self, key_cache: Tensor, rules: AttentionRules) -> bool:
        """Whether the compiled operators write and read such a cache: scores are products and nothing else.

        They lay keys and values out as they want them: what this says must hold as long as the cache does.
        """
        if key_cache.dtype == torch.int8:
            return True  # nobody else reads it: `service.engine.chosen_numbers` has seen to that
        special = (rules.softcap, rules.alibi_slopes, rules.relative_bias, rules.sinks)
        if not library.serves(key_cache) or any(rule is not None for rule in special):
            return False
        _, block_size, _, head_size = key_cache.shape
        return self._deterministic or library.attends(block_size, head_size)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rules: AttentionRules) -> Tensor:
        if rules.sinks is not None:
            return self._reference.packed(query, key, value, layout, rules)
        return padded_attention(query, key, value, layout, rules)


def _compiled(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
) -> Tensor:
    out: Tensor = torch.ops.slimpajama.paged_attention(
        query, key_cache, value_cache, layout.block_tables, layout.query_starts, layout.context_lens,
        rules.scale, rules.window or 0, rules.causal,
    )  # fmt: skip
    return out


def _with_whole_rows(x: Tensor) -> Tensor:
    """x [T, H, D] whose heads lie side by side."""
    whole = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if whole else x.contiguous()


def _decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    group: DecodeGroup,
    mask: Tensor | None,
    rules: AttentionRules,
) -> Tensor:
    """query [T, H, D] of the step; gives [B, H, D] of the group's rows."""
    num_kv_heads = key_cache.shape[2]
    padded = (len(group.tokens), group.padded_len, num_kv_heads, query.shape[2])
    key = _gather(key_cache, group.blocks).view(padded).transpose(1, 2)  # [B, K, L, D]
    value = _gather(value_cache, group.blocks).view(padded).transpose(1, 2)
    # A weight of zero does not silence a NaN: what others left in slots past a row's context must not be read.
    beyond = (torch.arange(group.padded_len) >= group.context_lens[:, None])[:, None, :, None]  # [B, 1, L, 1]
    key.masked_fill_(beyond, 0.0)
    value.masked_fill_(beyond, 0.0)
    # The queries that share a key head become the "sequence" of that head: no key is repeated.
    grouped = query.index_select(0, group.tokens).view(len(group.tokens), num_kv_heads, -1, query.shape[2])
    dtype = _fast_dtype(query.dtype)
    found = fused_attention(grouped.to(dtype), key.to(dtype), value.to(dtype), mask, rules)
    return found.flatten(1, 2).to(query.dtype)  # [B, K, G, D] to [B, H, D]


def _fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """What single queries are attended to in: a CPU without bfloat16 in hardware takes 3 to 6 times as long in it."""
    if dtype == torch.bfloat16 and not library.torch_has_bfloat16():
        return torch.float32
    return dtype


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """cache [num_blocks, block_size, K, D] and [N]; gives [N, block_size, K, D]."""
    # An embedding's look-up copies whole blocks; index_select goes through a general iterator, for each of them.
    return embedding(blocks, cache.flatten(1)).view(-1, *cache.shape[1:])


def _paged_plan(layout: PagedLayout, block_size: int) -> tuple[list[DecodeGroup], list[Prompt]]:
    starts = layout.query_starts.numpy().astype(np.int64)
    context_lens = layout.context_lens.numpy().astype(np.int64)
    tables = layout.block_tables.numpy()
    query_lens = np.diff(starts)
    num_blocks = -(-context_lens // block_size)
    single = np.flatnonzero(query_lens == 1)
    groups = []
    for members in groups_of_like_length(num_blocks[single], exact=False, slack=4):
        rows = single[members]
        longest = int(num_blocks[rows[0]])
        blocks = tables[rows, :longest].astype(np.int64).reshape(-1)
        groups.append(
            DecodeGroup(
                torch.from_numpy(starts[rows]),
                torch.from_numpy(blocks),
                torch.from_numpy(context_lens[rows]),
                longest * block_size,
            )
        )
    prompts = [
        Prompt(
            int(starts[row]),
            int(starts[row + 1]),
            int(context_lens[row]),
            torch.from_numpy(tables[row, : num_blocks[row]].astype(np.int64)),
        )
        for row in np.flatnonzero(query_lens > 1)
    ]
    return groups, prompts


def _decode_mask(group: DecodeGroup, rules: AttentionRules, dtype: torch.dtype, num_kv_heads: int) -> Tensor:
    """[B, 1, 1, L] bool, or [B, K, G, L] to be added; every row's query is its last position."""
    key_positions = torch.arange(group.padded_len)
    query_positions = group.context_lens[:, None] - 1  # [B, 1]
    written = key_positions < group.context_lens[:, None]  # [B, L]
    allowed = visible(query_positions, key_positions, rules) & written[:, None]  # [B, 1, L]
    bias = score_bias(query_positions, key_positions, rules)  # [H, B, 1, L]
    if bias is None:
        return allowed[:, None]
    bias = bias.squeeze(2).transpose(0, 1).masked_fill(~allowed, float("-inf"))  # [B, H, L]
    return bias.reshape(len(bias), num_kv_heads, -1, group.padded_len).to(dtype)


def _prompt(query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
    """query [T, H, D] at the last T of L positions, key and value [L, K, D]; gives [T, H, D]."""
    num_queries, num_keys = len(query), len(key)
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # [1, H or K, T or L, D]
    plain = rules.window is None and rules.alibi_slopes is None and rules.relative_bias is None
    if plain and rules.softcap is None and (not rules.causal or num_queries == num_keys):
        found = scaled_dot_product_attention(
            q, k, v, is_causal=rules.causal, scale=rules.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return found.squeeze(0).transpose(0, 1)
    out = torch.empty_like(query)
    before = num_keys - num_queries
    for start in range(0, num_queries, QUERY_SLICE):
        end = min(start + QUERY_SLICE, num_queries)
        last_key = before + end if rules.causal else num_keys
        first_key = max(before + start - rules.window + 1, 0) if rules.window is not None else 0
        mask = mask_for(
            torch.arange(before + start, before + end), torch.arange(first_key, last_key), rules, mask_dtype(query)
        )
        found = fused_attention(
            q[:, :, start:end], k[:, :, first_key:last_key], v[:, :, first_key:last_key], mask, rules
        )
        out[start:end] = found.squeeze(0).transpose(0, 1)
    return out
