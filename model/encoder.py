"""The encoder network: BERT and its kin, from RoBERTa to ModernBERT, set by an `EncoderConfig`.

Texts are packed end to end without padding; which kernel lets them attend, each to itself, is the business of the
`Attend` that the caller passes. What is read off the hidden states is `model.heads`. Runs in the worker process.

Legend: T tokens packed in the step, E hidden size, H heads, K key/value heads, D head size, W embedding width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention.interface import Attend, AttentionRules
from model.config import EncoderConfig, Rotary
from model.disentangled import Disentangled, RelativePositions, TextConvolution, Texts
from model.heads import Head
from model.layers import (
    MLP,
    Device,
    Embedding,
    GatedMLP,
    LayerNorm,
    Linear,
    OwnStretchTable,
    RMSNorm,
    RotaryTable,
    Rotation,
    parameter,
    rotate,
)

_MPNET_REACH = 128
"""Distance from which on all keys share MPNet's last bucket."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """What one layer sees of the step beside its hidden states."""

    index: int
    rules: AttentionRules
    rotation: Rotation | None
    texts: Texts | None


class Encoder(nn.Module):
    """Ids to hidden states; `head` is the checkpoint's own head, or None. Tables are on `device`."""

    def __init__(self, config: EncoderConfig, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.embedding = EncoderEmbedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config, first=index == 0) for index in range(config.num_weight_sets))
        rules, convolution = config.disentangled, config.convolution
        self.relative_bias = parameter(config.relative_buckets, config.num_heads) if config.relative_buckets else None
        self.relative_positions = RelativePositions(config, rules) if rules else None
        self.convolution = TextConvolution(config, convolution) if convolution else None
        self.norm = _norm(config, config.hidden_size) if config.pre_norm else None
        self.head = Head(config.head, config.hidden_size) if config.head else None
        rotaries = [config.rotary, config.local_rotary]
        self.rotary_tables = [_rotary_table(rotary, config.context_length, device) for rotary in rotaries if rotary]

    def forward(self, ids: Tensor, type_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids, type_ids and positions [T], positions from 0 in each text; returns [T, E]."""
        embedded: Tensor = self.embedding(ids, type_ids, positions)
        views = self._views(positions, embedded.dtype)
        hidden = embedded
        for view, weights in zip(views, self.config.weight_order or range(len(views)), strict=True):
            hidden = self.layers[weights](hidden, view, attend)
            if view.index == 0 and self.convolution is not None:
                assert view.texts is not None
                hidden = self.convolution(embedded, hidden, view.texts)
        return hidden if self.norm is None else self.norm(hidden)

    def _views(self, positions: Tensor, dtype: torch.dtype) -> list[LayerView]:
        config = self.config
        bias = None if self.relative_bias is None else mpnet_bias(self.relative_bias)
        rotations = [table(positions, dtype) for table in self.rotary_tables]
        texts = None if self.relative_positions is None else self.relative_positions(positions)
        views = []
        for index in range(config.num_layers):
            window = config.window(index)
            rules = AttentionRules(scale=config.attention_scale, causal=False, window=window, relative_bias=bias)
            local = window is not None and config.local_rotary is not None
            views.append(LayerView(index, rules, rotations[int(local)] if rotations else None, texts))
        return views


class EncoderEmbedding(nn.Module):
    """Tokens, positions and token types added up, normalised, and projected where the tables are narrower than E."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, types = config.embedding_size, config.num_token_types
        self.tokens = Embedding(config.vocab_size, size)
        self.positions = Embedding(config.num_positions, size) if config.learned_positions else None
        self.types = Embedding(types, size) if types else None
        self.tasks = Embedding(config.num_task_types, size) if config.num_task_types else None
        self.place = config.embedding_projection
        normed = size if self.place == "after_norm" else config.hidden_size
        self.norm = _norm(config, normed) if config.embedding_norm else None
        biased = self.place == "after_norm"
        self.projection = Linear(size, config.hidden_size, bias=biased) if self.place else None
        self.offset = config.position_offset

    def forward(self, ids: Tensor, type_ids: Tensor, positions: Tensor) -> Tensor:
        """ids, type_ids and positions [T]; returns [T, E]."""
        embedded: Tensor = self.tokens(ids)  # [T, W]
        if self.types is not None:
            embedded = embedded + self.types(type_ids)
        if self.positions is not None:
            embedded = embedded + self.positions(positions + self.offset)
        if self.tasks is not None:
            embedded = embedded + self.tasks.weight[0]
        if self.projection is not None and self.place == "before_norm":
            embedded = self.projection(embedded)
        if self.norm is not None:
            embedded = self.norm(embedded)
        if self.projection is not None and self.place == "after_norm":
            embedded = self.projection(embedded)
        return embedded


class EncoderLayer(nn.Module):
    """Attention and MLP, each with its residual sum and its norm (after the sum, or before all in a pre-norm layer)."""

    def __init__(self, config: EncoderConfig, *, first: bool) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.query_key_value = Linear(size, (self.num_heads + 2 * self.num_kv_heads) * config.head_size, bias=bias)
        self.disentangled = Disentangled(config, config.disentangled) if config.disentangled else None
        self.output = Linear(size, size, bias=bias)
        self.attention_norm = None if first and not config.first_norm else _norm(config, size)
        self.mlp = _mlp(config)
        self.mlp_norm = _norm(config, size)
        self.pre_norm = config.pre_norm
        self.head_size = config.head_size

    def forward(self, hidden: Tensor, view: LayerView, attend: Attend) -> Tensor:
        """hidden [T, E] in and out."""
        norm = self.attention_norm
        if self.pre_norm:
            hidden = hidden + self._attended(hidden if norm is None else norm(hidden), view, attend)
            out: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        else:
            assert isinstance(norm, LayerNorm)
            assert isinstance(self.mlp_norm, LayerNorm)
            hidden = norm.of_sum(hidden, self._attended(hidden, view, attend))
            out = self.mlp_norm.of_sum(hidden, self.mlp(hidden))
        return out

    def _attended(self, hidden: Tensor, view: LayerView, attend: Attend) -> Tensor:
        fused: Tensor = self.query_key_value(hidden)
        fused = fused.view(hidden.shape[0], -1, self.head_size)  # [T, H + 2K, D]
        placed, value = fused.tensor_split([self.num_heads + self.num_kv_heads], dim=1)
        if view.rotation is not None:
            # Queries and keys lie side by side, so one pass turns both.
            placed = rotate(placed, view.rotation)
        query, key = placed.tensor_split([self.num_heads], dim=1)  # [T, H, D] and [T, K, D]
        if self.disentangled is not None:
            assert view.texts is not None
            attended = self.disentangled(query, key, value, view.texts, self.query_key_value)
        else:
            attended = attend(view.index, query, key, value, view.rules)  # [T, H, D]
        out: Tensor = self.output(attended.flatten(1))
        return out


def mpnet_bias(weight: Tensor) -> Tensor:
    """The bias of each head for each distance j - i from -R to R: weight [buckets, H] gives float32 [H, 2R + 1].

    Worked example, 32 buckets: keys to the left (j < i) use 0..15, keys to the right 16..31; of each sixteen the
    first eight are single distances, the others grow logarithmically up to 128 (arXiv 2004.09297 takes T5's scheme).
    """
    sides = weight.shape[0] // 2
    exact = sides // 2
    distances = torch.arange(-_MPNET_REACH, _MPNET_REACH + 1)
    size = distances.abs()
    growth = torch.log(size.float().clamp(min=1) / exact) / math.log(_MPNET_REACH / exact)
    far = (exact + (growth * (sides - exact)).long()).clamp(max=sides - 1)
    buckets = torch.where(size < exact, size, far) + (distances > 0) * sides
    return weight[buckets.to(weight.device)].T.float().contiguous()


def _rotary_table(rotary: Rotary, length: int, device: Device) -> RotaryTable:
    if rotary.scaling is not None and rotary.scaling.kind == "dynamic":
        return OwnStretchTable(rotary, device)
    return RotaryTable(rotary, length, device)


def _mlp(config: EncoderConfig) -> MLP | GatedMLP:
    sizes, activation, bias = (config.hidden_size, config.intermediate_size), config.activation, config.mlp_bias
    if not config.gated:
        return MLP(*sizes, activation=activation, bias=bias)
    return GatedMLP(*sizes, activation=activation, bias=bias, down_bias=config.mlp_down_bias)


def _norm(config: EncoderConfig, size: int) -> LayerNorm | RMSNorm:
    if config.norm == "rms":
        return RMSNorm(size, config.norm_epsilon)
    return LayerNorm(size, config.norm_epsilon, bias=config.norm_bias)
