"""The law of attention: plain float32 arithmetic, sequence by sequence, for every rule and on any device.

Every other backend is tested against this one, and falls back to it for rules that it does not know. Nothing here is
tuned for speed. It does not know the networks or the scheduler. Runs in the worker process.

Legend: T tokens in the step, L keys of one sequence, H query heads, K key/value heads, D head size.
"""

from itertools import pairwise

import torch
from torch import Tensor

from model.attention.interface import AttentionRules, PackedLayout, PagedLayout


def visible(query_positions: Tensor, key_positions: Tensor, rules: AttentionRules) -> Tensor:
    """Who sees whom: bool [..., T, L] from positions [..., T] and [..., L]."""
    ahead = key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1)
    allowed = ahead <= 0 if rules.causal else torch.ones_like(ahead, dtype=torch.bool)
    if rules.window is not None:
        allowed = allowed & (ahead > -rules.window) & (ahead < rules.window)
    return allowed


def score_bias(query_positions: Tensor, key_positions: Tensor, rules: AttentionRules) -> Tensor | None:
    """What ALiBi and relative positions add to the scores: float32 [H, ..., T, L], or None.

    Worked example: R = 2 and a key three places before its query: clamp(-3, -2, 2) + 2 = column 0 of `relative_bias`.
    """
    ahead = key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1)
    bias: Tensor | None = None
    if rules.alibi_slopes is not None:
        bias = rules.alibi_slopes.float().view(-1, *[1] * ahead.dim()) * ahead
    if rules.relative_bias is not None:
        reach = (rules.relative_bias.shape[1] - 1) // 2
        relative = rules.relative_bias.float()[:, ahead.clamp(-reach, reach) + reach]
        bias = relative if bias is None else bias + relative
    return bias


def attend_one(query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules, *, first_position: int) -> Tensor:
    """One sequence: query [T, H, D] at positions first_position.., key and value [L, K, D] at 0..; gives [T, H, D]."""
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    q = query.float().transpose(0, 1)  # [H, T, D]
    k = key.float().transpose(0, 1).repeat_interleave(group, dim=0)  # [H, L, D]
    v = value.float().transpose(0, 1).repeat_interleave(group, dim=0)  # [H, L, D]
    scores = torch.matmul(q, k.transpose(1, 2)) * rules.scale  # [H, T, L]
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    query_positions = torch.arange(num_queries, device=query.device) + first_position
    key_positions = torch.arange(num_keys, device=query.device)
    bias = score_bias(query_positions, key_positions, rules)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible(query_positions, key_positions, rules), float("-inf"))
    if rules.sinks is not None:
        sinks = rules.sinks.float()[:, None, None].expand(-1, num_queries, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=2), dim=2)[:, :, :-1]
    else:
        weights = torch.softmax(scores, dim=2)
    return torch.matmul(weights, v).transpose(0, 1).to(query.dtype)


class ReferenceAttention:
    """`AttentionBackend` in plain arithmetic."""

    def paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
    ) -> Tensor:
        out = torch.empty_like(query)
        block_size = key_cache.shape[1]
        starts = layout.query_starts.tolist()
        for row, context_len in enumerate(layout.context_lens.tolist()):
            start, end = starts[row], starts[row + 1]
            if start == end:
                continue
            blocks = layout.block_tables[row, : -(-context_len // block_size)].long()
            key = key_cache[blocks].flatten(0, 1)[:context_len]  # [L, K, D]
            value = value_cache[blocks].flatten(0, 1)[:context_len]
            out[start:end] = attend_one(query[start:end], key, value, rules, first_position=context_len - (end - start))
        return out

    def packed(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rules: AttentionRules) -> Tensor:
        out = torch.empty_like(query)
        starts = layout.starts.tolist()
        for start, end in pairwise(starts):
            out[start:end] = attend_one(query[start:end], key[start:end], value[start:end], rules, first_position=0)
        return out

    def write(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        rules: AttentionRules,  # noqa: ARG002 - part of the interface
    ) -> None:
        key_cache.flatten(0, 1).index_copy_(0, slots, key.to(key_cache.dtype))
        value_cache.flatten(0, 1).index_copy_(0, slots, value.to(value_cache.dtype))
