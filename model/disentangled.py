"""DeBERTa's attention (arXiv 2006.03654) and its convolution: what this family alone needs beside the common encoder.

A score is the sum of content to content, content to position and position to content; the last two depend on the
(bucketed) distance of the two tokens. Texts arrive packed and are padded in here, a bounded group at a time, because
the added scores of a pair cannot be written as an `AttentionRules`. Runs in the worker process.

Legend: T tokens packed in the step, B texts of a group, L its longest text, E hidden size, H heads, D head size,
S span: half the rows of the table of relative positions, P the table rows that a group can reach.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.padded import groups_of_like_length
from model.config import Convolution, DisentangledAttention, EncoderConfig
from model.heads import ACTIVATIONS
from model.layers import LayerNorm, Linear, parameter

MAX_SCORES = 1 << 25
"""Scores held at once: a group has as many texts as that allows, and at least one."""


@dataclass(frozen=True, slots=True)
class TextGroup:
    """Some texts of like length, padded: `rows` [B, L] are their tokens' places in the step."""

    rows: Tensor
    present: Tensor  # [B, L] bool
    reached: Tensor  # [P] int64: rows of the table of relative positions
    distances: Tensor  # [L, L] int64: which of the reached rows belongs to query i and key j


@dataclass(frozen=True, slots=True)
class Texts:
    """The step's groups, and the table of relative positions [2S, E]; the same for all layers."""

    groups: list[TextGroup]
    table: Tensor


class RelativePositions(nn.Module):
    """The table of relative positions, and the division of a step into groups."""

    def __init__(self, config: EncoderConfig, rules: DisentangledAttention) -> None:
        super().__init__()
        self.rules = rules
        self.num_heads = config.num_heads
        self.weight = parameter(2 * rules.span, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.norm_epsilon) if rules.normalized else None

    def forward(self, positions: Tensor) -> Texts:
        """positions [T], 0 at the start of each text."""
        starts = torch.nonzero(positions == 0).flatten().cpu().numpy()
        lengths = np.diff(starts, append=len(positions))
        groups = []
        for members in groups_of_like_length(lengths, exact=False, slack=16):
            longest = int(lengths[members[0]])
            size = max(1, MAX_SCORES // (longest * longest * self.num_heads))
            for first in range(0, len(members), size):
                chosen = torch.from_numpy(members[first : first + size])
                groups.append(self._group(torch.from_numpy(starts)[chosen], torch.from_numpy(lengths)[chosen]))
        return Texts(groups, self.weight if self.norm is None else self.norm(self.weight))

    def _group(self, starts: Tensor, lengths: Tensor) -> TextGroup:
        """starts and lengths [B] of texts of like length, on the CPU."""
        device = self.weight.device
        longest = int(lengths.max())
        steps = torch.arange(longest)
        present = steps < lengths[:, None]  # [B, L]
        begins = starts[:, None]
        # Padding repeats a token of the same text: were it another's, and not finite, 0 times it would be NaN.
        rows = torch.where(present, begins + steps, begins)
        # Distances i - j from L - 1 down to -(L - 1): a text of L tokens reaches no other rows of the table.
        wanted = self._table_rows(torch.arange(longest - 1, -longest, -1))  # [2L - 1]
        reached, inverse = torch.unique_consecutive(wanted, return_inverse=True)
        distances = inverse[steps[None, :] - steps[:, None] + longest - 1]  # [L, L]
        return TextGroup(rows.to(device), present.to(device), reached.to(device), distances.to(device))

    def _table_rows(self, distances: Tensor) -> Tensor:
        """Row of the table for each distance i - j.

        Worked example, 8 buckets and a longest distance of 16: distances 0..4 have their own bucket, 5 has 5, and
        15 has 7; span 8, so that distance -3 reads row 5.
        """
        rules = self.rules
        if rules.num_buckets is not None:
            distances = log_buckets(distances, rules.num_buckets, rules.max_distance)
        return (distances + rules.span).clamp(0, 2 * rules.span - 1)


def log_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Small distances as they are, larger ones by logarithm (`make_log_bucket_position` of the DeBERTa authors)."""
    middle = num_buckets // 2
    near = (distances < middle) & (distances > -middle)
    size = torch.where(near, middle - 1, distances.abs())
    growth = torch.log(size / middle) / torch.log(torch.tensor((max_distance - 1) / middle))
    far = torch.ceil(growth * (middle - 1)) + middle
    return torch.where(size <= middle, distances, (far * distances.sign()).long())


class Disentangled(nn.Module):
    """One layer's attention, with the projections of relative positions that are its own."""

    def __init__(self, config: EncoderConfig, rules: DisentangledAttention) -> None:
        super().__init__()
        self.rules = rules
        self.scale = config.attention_scale
        size = config.hidden_size
        own = not rules.shared_projections
        self.position_key = Linear(size, size, bias=True) if own and rules.content_to_position else None
        self.position_query = Linear(size, size, bias=True) if own and rules.position_to_content else None
        self._positions: tuple[Tensor | None, Tensor | None] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, texts: Texts, shared: Linear) -> Tensor:
        """query, key and value [T, H, D]; `shared` is the layer's fused projection. Returns [T, H, D]."""
        if self._positions is None:
            # They depend on weights alone, and cost more than a short text's whole layer.
            self._positions = self._position_projections(texts.table, shared, query.shape[1:])
        keys, queries = self._positions
        attended = torch.empty_like(query)
        for group in texts.groups:
            q, k, v = (x[group.rows].transpose(1, 2) for x in (query, key, value))  # [B, H, L, D]
            bias = self._bias(q, k, group, keys, queries).masked_fill_(~group.present[:, None, None, :], -math.inf)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
            attended[group.rows[group.present]] = out.transpose(1, 2)[group.present]
        return attended

    def _position_projections(
        self, table: Tensor, shared: Linear, heads: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys and queries of the relative positions, both [H, 2S, D]."""
        size = table.shape[1]
        if self.rules.shared_projections:
            projected = shared(table)
            keys, queries = projected[:, size : 2 * size], projected[:, :size]
        else:
            keys = None if self.position_key is None else self.position_key(table)
            queries = None if self.position_query is None else self.position_query(table)
        rules = self.rules
        return (
            keys.unflatten(-1, heads).transpose(0, 1) if keys is not None and rules.content_to_position else None,
            queries.unflatten(-1, heads).transpose(0, 1) if queries is not None and rules.position_to_content else None,
        )

    def _bias(
        self, query: Tensor, key: Tensor, group: TextGroup, keys: Tensor | None, queries: Tensor | None
    ) -> Tensor:
        """What distance adds to the scores: [B, H, L, L]."""
        texts, heads, length, _ = query.shape
        index = group.distances.expand(texts, heads, length, length)
        bias = query.new_zeros(texts, heads, length, length)
        if keys is not None:
            reached = keys[:, group.reached].transpose(-1, -2)  # [H, D, P]
            bias += torch.gather(query @ reached, -1, index)
        if queries is not None:
            reached = queries[:, group.reached].transpose(-1, -2)  # [H, D, P]
            bias += torch.gather(key @ reached, -1, index.transpose(-1, -2)).transpose(-1, -2)
        return bias * self.scale


class TextConvolution(nn.Module):
    """A convolution along each text's embeddings, added to the first layer's output and normalised with it."""

    def __init__(self, config: EncoderConfig, convolution: Convolution) -> None:
        super().__init__()
        size, width = config.hidden_size, convolution.kernel_size
        self.weight = parameter(size, size // convolution.groups, width)
        self.bias = parameter(size)
        self.norm = LayerNorm(size, config.norm_epsilon)
        self.groups = convolution.groups
        self.padding = (width - 1) // 2
        self.activation = ACTIVATIONS[convolution.activation]

    def forward(self, embedded: Tensor, hidden: Tensor, texts: Texts) -> Tensor:
        """embedded and hidden [T, E]; returns [T, E]."""
        convolved = torch.empty_like(hidden)
        for group in texts.groups:
            padded = embedded[group.rows] * group.present[..., None]  # [B, L, E]
            out = functional.conv1d(
                padded.transpose(1, 2), self.weight, self.bias, padding=self.padding, groups=self.groups
            )
            convolved[group.rows[group.present]] = out.transpose(1, 2)[group.present]
        result: Tensor = self.norm(hidden + self.activation(convolved))
        return result
