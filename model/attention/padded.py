"""Attention of whole sequences in padded batches of like length, on any device and for every rule but sinks.

Serves encoders on CPUs, and on GPUs where the rules are beyond the packed kernels. Also holds what the CPU backend
shares with it: one call of PyTorch's fused attention, masks, grouping by length. Runs in the worker process.

Legend: T tokens in the step, B sequences, L places (padded), H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention.interface import AttentionRules, PackedLayout, PagedLayout
from model.attention.reference import score_bias, visible


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """Whole sequences of like length, to be padded to `padded_len`."""

    gather: Tensor  # [B * L] int64: token of each padded place
    scatter: Tensor | None  # [sum of lengths] int64: padded places that hold a token; None: all do, there is no padding
    tokens: Tensor  # [sum of lengths] int64: where they go
    lens: Tensor  # [B] int64
    padded_len: int


def padded_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rules: AttentionRules) -> Tensor:
    """query [T, H, D], key and value [T, K, D], each sequence for itself. Returns [T, H, D]."""
    # A bias differs from head to head, so together with padding it would need a mask per sequence and head.
    exact = rules.alibi_slopes is not None or rules.relative_bias is not None
    plan = ("packed", exact)
    if plan not in layout.prepared:
        layout.prepared[plan] = _packed_plan(layout, exact=exact)
    out = torch.empty_like(query)
    for index, group in enumerate(layout.prepared[plan]):
        mask = kept_mask(layout, (plan, index), rules, partial(_packed_mask, group, rules, mask_dtype(query)))
        q, k, v = (
            tensor.index_select(0, group.gather).view(-1, group.padded_len, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (query, key, value)
        )  # [B, H or K, L, D]
        found = fused_attention(q, k, v, mask, rules).transpose(1, 2).flatten(0, 1)
        if group.scatter is not None:
            found = found.index_select(0, group.scatter)
        out.index_copy_(0, group.tokens, found)
    return out


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rules: AttentionRules) -> Tensor:
    """query [B, H, T, D], key and value [B, K, L, D]; mask (bool, or added) broadcast to [B, H, T, L]."""
    grouped = query.shape[1] != key.shape[1]
    if rules.softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rules.scale, enable_gqa=grouped)
    if grouped:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * rules.scale
    scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.softmax(scores, dim=3).to(value.dtype), value)


def mask_dtype(query: Tensor) -> torch.dtype:
    """Of what is added to the scores: bfloat16 cannot tell ALiBi's far positions apart, but a GPU's kernels insist."""
    return torch.float32 if query.device.type == "cpu" else query.dtype


def mask_for(query_positions: Tensor, key_positions: Tensor, rules: AttentionRules, dtype: torch.dtype) -> Tensor:
    """bool [..., 1, T, L], or with ALiBi or relative positions what is added to the scores, [H, T, L]."""
    allowed = visible(query_positions, key_positions, rules)
    bias = score_bias(query_positions, key_positions, rules)
    if bias is None:
        return allowed.unsqueeze(-3)
    return bias.masked_fill(~allowed, float("-inf")).to(dtype)


def groups_of_like_length(lens: NDArray[np.int64], *, exact: bool, slack: int) -> Iterator[NDArray[np.int64]]:
    """Indices of `lens` in groups, longest first; a group's longest is at most `slack` or a third above its others.

    Worked example, slack 0: lens [9, 4, 8, 3] gives [0, 2] and [1, 3].
    """
    order = np.argsort(-lens, kind="stable")
    first = 0
    while first < len(order):
        longest = int(lens[order[first]])
        least = longest if exact else min(longest - slack, -(-3 * longest // 4))
        end = int(np.searchsorted(-lens[order], -least, side="right"))
        yield order[first:end]
        first = end


def kept_mask(
    layout: PagedLayout | PackedLayout, part: object, rules: AttentionRules, make: Callable[[], Tensor | None]
) -> Tensor | None:
    """The mask of a part of the layout under these rules, made by the first layer that asks, and anew where layers have
    biases of their own (UMT5): of those only the last is kept, for all together take more memory than the network.

    The rules are kept with it: their tensors are told apart by identity, so they must live as long.
    """
    key = (part, rules.causal, rules.window)
    kept = layout.prepared.get(key)
    if kept is None or not _same_bias(kept[0], rules):
        kept = layout.prepared[key] = (rules, make())
    mask: Tensor | None = kept[1]
    return mask


def _same_bias(one: AttentionRules, other: AttentionRules) -> bool:
    return one.alibi_slopes is other.alibi_slopes and one.relative_bias is other.relative_bias


def _packed_plan(layout: PackedLayout, *, exact: bool) -> list[PackedGroup]:
    device = layout.starts.device
    starts = layout.starts.cpu().numpy().astype(np.int64)
    lens = np.diff(starts)
    groups = []
    for members in groups_of_like_length(lens, exact=exact, slack=16):
        longest = int(lens[members[0]])
        if longest == 0:
            continue
        places = np.arange(longest)
        real = places < lens[members][:, None]  # [B, L]
        begins = starts[members][:, None]
        # Padding repeats a token of the same sequence: were it another's, and not finite, 0 times it would be NaN.
        gather = np.where(real, begins + places, begins).reshape(-1)
        full = bool(real.all())
        groups.append(
            PackedGroup(
                torch.from_numpy(gather).to(device),
                None if full else torch.from_numpy(np.flatnonzero(real)).to(device),
                torch.from_numpy(gather[real.reshape(-1)]).to(device),
                torch.from_numpy(lens[members]).to(device),
                longest,
            )
        )
    return groups


def _packed_mask(group: PackedGroup, rules: AttentionRules, dtype: torch.dtype) -> Tensor | None:
    positions = torch.arange(group.padded_len, device=group.lens.device)
    free = not rules.causal and rules.window is None and rules.alibi_slopes is None and rules.relative_bias is None
    mask = None if free else mask_for(positions, positions, rules, dtype)  # [1 or H, L, L]
    if group.scatter is None:
        return mask
    real = (positions < group.lens[:, None])[:, None, None]  # [B, 1, 1, L]
    # A padded query sees itself, if the window hides all real keys from it: a softmax over nothing gives NaN.
    return real if mask is None else (mask & real) | torch.eye(group.padded_len, dtype=torch.bool, device=real.device)
