"""The decoder network, top to bottom, set by `DecoderConfig`: ids and positions in, hidden states and logits out.

Does not know where keys and values are kept or which kernel reads them (`Attend`), nor which architecture it is.
Runs in the worker process.

Legend: T tokens packed in the step, S positions whose logits are wanted, E hidden size, H heads, K key/value heads,
D head size, F intermediate size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.adapters.low_rank import StepAdapters
from model.attention.interface import Attend, AttentionRules
from model.config import DecoderConfig, QueryGrowth
from model.experts import SparseMLP
from model.layers import (
    MLP,
    AddingNorm,
    Additions,
    Device,
    Embedding,
    GatedMLP,
    HeadsLayerNorm,
    LayerNorm,
    Linear,
    OffsetLayerNorm,
    PlainLayerNorm,
    RMSNorm,
    RotaryTable,
    Rotation,
    alibi_slopes,
    project,
    rotate,
)

AttendHeads = Callable[[Tensor, Rotation | None, Attend], Tensor]
"""What becomes of projected heads [T, H + 2K, D], queries first, up to [T, H, D] attended."""


class Decoder(nn.Module):
    """A causal language model. Its parameters are on the meta device until they are filled; tables are on `device`."""

    def __init__(self, config: DecoderConfig, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        num_positions = config.num_learned_positions
        self.position_embedding = Embedding(num_positions, config.hidden_size) if num_positions else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        alibi = config.positions == "alibi"
        slopes = (alibi_slopes(config.num_heads) * config.alibi_scale).to(device) if alibi else None
        self.layers = nn.ModuleList(DecoderLayer(config, index, slopes) for index in range(config.num_layers))
        self.norm = make_norm(config)
        self.output = Linear(config.hidden_size, config.vocab_size, bias=config.logits_bias)
        rotaries = [config.rotary, config.local_rotary]
        self.rotary_tables = [RotaryTable(rotary, config.context_length, device) for rotary in rotaries if rotary]

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, adapters: StepAdapters | None = None) -> Tensor:
        """ids [T], positions [T]; returns hidden states [T, E], normed, of which `logits` takes the rows wanted."""
        hidden = self.embedding(ids)  # [T, E]
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale(hidden.dtype)
        if self.position_embedding is not None:
            offset = self.config.position_offset
            hidden = hidden + self.position_embedding(positions + offset if offset else positions)
        hidden = _normed(self.embedding_norm, hidden)
        rotations = [table(positions, hidden.dtype) for table in self.rotary_tables]
        if self.config.query_growth is not None:
            attend = _growing(attend, positions, self.config.query_growth)
        delta: Tensor | None = None
        for layer in self.layers:
            hidden, delta = layer(hidden, delta, rotations, attend, adapters)
        return _added(self.norm, hidden, delta)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, E]; returns float32 [S, V]."""
        logits: Tensor = self.output(hidden).float()
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embedding_scale(self, dtype: torch.dtype) -> float:
        scale = self.config.embedding_scale
        return torch.tensor(scale, dtype=dtype).item() if self.config.embedding_scale_in_dtype else scale


class DecoderLayer(nn.Module):
    """Attention and MLP around a residual stream; which of the four norms there are is the config's choice."""

    def __init__(self, config: DecoderConfig, index: int, slopes: Tensor | None) -> None:
        super().__init__()
        before = config.norm_places in ("before", "around")
        after = config.norm_places in ("after", "around")
        self.attention_norm = make_norm(config) if before else None
        self.attention = DecoderAttention(config, index, slopes)
        self.attention_output_norm = make_norm(config) if after else None
        self.mlp_norm = make_norm(config) if before and not config.shared_norm else None
        self.mlp = make_mlp(config, index)
        self.mlp_output_norm = make_norm(config) if after else None
        self.parallel_residual = config.parallel_residual
        self.shared_norm = config.shared_norm
        self.residual_scale = config.residual_scale

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        rotations: list[Rotation],
        attend: Attend,
        adapters: StepAdapters | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream [T, E], and what the next layer is to add to it before all else, in and out.

        A sum is left to who norms it, who may do both in one pass.
        """
        additions = None if adapters is None else adapters.of_layer(self.attention.index)
        hidden, normed = _added(self.attention_norm, hidden, delta)
        attended = self.attention(normed, rotations, attend, additions)
        attended = self.scaled(_normed(self.attention_output_norm, attended))
        if self.parallel_residual:
            moved = self.mlp(normed if self.shared_norm else _normed(self.mlp_norm, hidden), additions)
            return hidden + attended, self.scaled(_normed(self.mlp_output_norm, moved))
        hidden, normed = _added(self.mlp_norm, hidden, attended)
        return hidden, self.scaled(_normed(self.mlp_output_norm, self.mlp(normed, additions)))

    def scaled(self, moved: Tensor) -> Tensor:
        """What a sublayer adds to the stream."""
        return moved if self.residual_scale == 1.0 else moved * self.residual_scale


class DecoderAttention(nn.Module):
    """Projections, norms and positions of queries and keys; the attending itself is the caller's `Attend`."""

    def __init__(self, config: DecoderConfig, index: int, slopes: Tensor | None) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_size = config.head_size
        self.num_fused_heads = config.num_heads + 2 * config.num_kv_heads
        num_rows = self.num_fused_heads * config.head_size
        self.query_key_value = Linear(config.hidden_size, num_rows, bias=config.query_key_value_bias)
        self.output = Linear(config.num_heads * config.head_size, config.hidden_size, bias=config.attention_output_bias)
        self.clip = config.query_key_value_clip
        self.per_head_norm = config.query_key_norm in ("head", "heads")
        self.turned_norm = config.turned_norm
        self.query_norm = make_heads_norm(config, config.num_heads)
        self.key_norm = make_heads_norm(config, config.num_kv_heads)
        window = config.window(index)
        self.rules = AttentionRules(
            scale=config.attention_scale,
            causal=config.causal,
            window=window,
            softcap=config.attention_softcap,
            alibi_slopes=slopes,
        )
        local = window is not None and config.local_rotary is not None
        self.rotation = int(local) if config.rotates(index) else None
        self.attend_heads: AttendHeads | None = None
        """Norms, turns, stores and attends in fewer passes, where the device has kernels for it."""

    def forward(
        self, hidden: Tensor, rotations: list[Rotation], attend: Attend, additions: Additions | None = None
    ) -> Tensor:
        """hidden [T, E] in and out."""
        fused = project(self.query_key_value, "query_key_value", hidden, additions)
        attended = self.attended(fused, rotations, attend)
        return project(self.output, "output", attended.flatten(1), additions)

    def attended(self, fused: Tensor, rotations: list[Rotation], attend: Attend) -> Tensor:
        """fused [T, (H + 2K) * D], as projected; returns [T, H, D]."""
        num_turned = self.num_heads + self.num_kv_heads
        if self.clip is not None:
            fused = fused.clamp(-self.clip, self.clip)
        fused = fused.view(-1, self.num_fused_heads, self.head_size)
        rotation = None if self.rotation is None else rotations[self.rotation]
        if self.attend_heads is not None:
            return self.attend_heads(fused, rotation, attend)
        query_key, value = fused[:, :num_turned], fused[:, num_turned:]
        query_key = self._turned(query_key, rotation)
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        return attend(self.index, query, key, value, self.rules)

    def _turned(self, query_key: Tensor, rotation: Rotation | None) -> Tensor:
        """query_key [T, H + K, D], normed and turned."""
        query_key = query_key if self.turned_norm else self._both_normed(query_key)
        # Queries and keys lie side by side, so one pass turns both.
        query_key = query_key if rotation is None else rotate(query_key, rotation)
        return self._both_normed(query_key) if self.turned_norm else query_key

    def _both_normed(self, query_key: Tensor) -> Tensor:
        if self.query_norm is None or self.key_norm is None:
            return query_key
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        return torch.cat((self._normed(self.query_norm, query), self._normed(self.key_norm, key)), dim=1)

    def _normed(self, norm: nn.Module, heads: Tensor) -> Tensor:
        """heads [T, H, D] in and out, each head for itself or all as one vector."""
        if self.per_head_norm:
            out: Tensor = norm(heads)
            return out
        flat: Tensor = norm(heads.flatten(1))  # [T, H * D]
        return flat.view(heads.shape)


def make_mlp(config: DecoderConfig, layer: int) -> MLP | GatedMLP | SparseMLP:
    experts = config.experts_of(layer)
    if experts is not None:
        return SparseMLP(config.hidden_size, experts, activation=config.activation)
    mlp = GatedMLP if config.gated else MLP
    return mlp(config.hidden_size, config.intermediate_size, activation=config.activation, bias=config.mlp_bias)


def make_norm(config: DecoderConfig, size: int | None = None) -> nn.Module:
    size = config.hidden_size if size is None else size
    if config.norm == "rms":
        return RMSNorm(size, config.norm_epsilon, offset=config.norm_offset)
    if not config.norm_weight:
        return PlainLayerNorm(size, config.norm_epsilon)
    if config.norm_offset != 0.0:
        return OffsetLayerNorm(size, config.norm_epsilon, bias=config.norm_bias, offset=config.norm_offset)
    return LayerNorm(size, config.norm_epsilon, bias=config.norm_bias)


def make_heads_norm(config: DecoderConfig, num_heads: int) -> nn.Module | None:
    """Of queries or of keys, if they are normed."""
    match config.query_key_norm:
        case None:
            return None
        case "head":
            return make_norm(config, config.head_size)
        case "heads":
            return HeadsLayerNorm(num_heads, config.head_size, config.norm_epsilon)
        case "full":
            return make_norm(config, num_heads * config.head_size)


def _growing(attend: Attend, positions: Tensor, growth: QueryGrowth) -> Attend:
    """Attends with queries that grow with their positions [T]."""
    factors = 1 + growth.beta * torch.log1p((positions // growth.length).float())[:, None, None]  # [T, 1, 1]

    def attended(layer: int, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        return attend(layer, query * factors.to(query.dtype), key, value, rules)

    return attended


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    out: Tensor = norm(x)
    return out


def _added(norm: nn.Module | None, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden + delta, and that normed."""
    if isinstance(norm, AddingNorm):
        return norm.add(hidden, delta)
    if delta is not None:
        hidden = hidden + delta
    return hidden, _normed(norm, hidden)
