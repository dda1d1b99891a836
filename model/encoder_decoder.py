"""The encoder-decoder network: T5, BART and their kin, set by an `EncoderDecoderConfig`.

One pass of the encoder over the source gives hidden states, from which each decoder layer's cross-attention keys and
values are made once; the decoder then runs step by step like a causal language model that also looks at those.
Tokens of all sequences are packed flat, without padding. Where keys and values are kept, and which kernel reads them,
is the business of the `Attend` and `CrossAttend` that the caller passes. Runs in the worker process.

Legend: T tokens packed in the step, S rows whose logits are wanted, E hidden size, H heads, D head size, V vocabulary,
R distance past which T5 tells no positions apart.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.attention.interface import Attend, AttentionRules, CrossAttend
from model.config import EncoderDecoderConfig
from model.heads import Head
from model.layers import MLP, Device, Embedding, GatedMLP, LayerNorm, Linear, RMSNorm, parameter
from model.position_tables import marian_table, relative_buckets, tensor2tensor_table


class EncoderDecoder(nn.Module):
    """Source ids to hidden states, target ids to logits.

    Its parameters are on the meta device until they are filled; position tables are made on `device`.
    """

    def __init__(self, config: EncoderDecoderConfig, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, device)
        self.decoder = Decoder(config, device)
        self.output = Linear(config.hidden_size, config.vocab_size)
        self.logits_bias = parameter(1, config.vocab_size) if config.logits_bias else None

    def encode(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Source ids [T] to hidden states [T, E]."""
        hidden: Tensor = self.encoder(ids, positions, attend)
        return hidden

    def cross_keys_values(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each decoder layer the keys and values, both [T, H, D], of the encoded source [T, E]."""
        return [attention.keys_values(hidden) for attention in self.decoder.cross_attentions()]

    @property
    def cross_rules(self) -> AttentionRules:
        """By which the decoder looks at the source."""
        return self.decoder.cross_rules

    def decode(self, ids: Tensor, positions: Tensor, attend: Attend, cross: CrossAttend) -> Tensor:
        """Target ids [T] to hidden states [T, E], of which `logits` takes the rows wanted."""
        hidden: Tensor = self.decoder(ids, positions, attend, cross)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Decoder states [S, E] to float32 [S, V]."""
        if self.config.logit_scale != 1.0:
            hidden = hidden * self.config.logit_scale
        logits: Tensor = self.output(hidden).float()
        return logits if self.logits_bias is None else logits + self.logits_bias


class ClassifyingEncoderDecoder(EncoderDecoder):
    """BART's way of classifying: the source is read a second time, as the target, and `head` reads its states."""

    def __init__(self, config: EncoderDecoderConfig, device: Device = "cpu") -> None:
        super().__init__(config, device)
        assert config.head is not None
        assert config.target_start_id is not None
        del self.output
        self.head = Head(config.head, config.hidden_size)
        self.target_start_id = config.target_start_id

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions [T], positions from 0 in each text; returns the decoder's states [T, E]."""
        crossed = self.cross_keys_values(self.encode(ids, positions, attend))

        def cross(layer: int, query: Tensor, rules: AttentionRules) -> Tensor:
            key, value = crossed[layer]
            return attend(layer, query, key, value, rules)

        # The target is the source one place later: [s, a, b] of the source [a, b, c], for each text.
        target = ids.roll(1).masked_fill(positions == 0, self.target_start_id)
        return self.decode(target, positions, attend, cross)


class EncoderAlone(nn.Module):
    """Source ids to hidden states, without a decoder: what embedders are made of (sentence-t5, arXiv 2108.08877)."""

    def __init__(self, config: EncoderDecoderConfig, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, device)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions [T], positions from 0 in each text; returns [T, E]."""
        hidden: Tensor = self.encoder(ids, positions, attend)
        return hidden


class Encoder(nn.Module):
    def __init__(self, config: EncoderDecoderConfig, device: Device) -> None:
        super().__init__()
        self.embedding = InputEmbedding(config, config.source_vocab_size or config.vocab_size, device)
        self.attention_scale = config.encoder_attention_scale
        relative = config.positions == "relative" and config.shared_relative_bias
        self.relative_bias = RelativeBias(config, config.num_encoder_heads, two_sided=True) if relative else None
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.num_encoder_layers))
        self.norm = make_norm(config) if config.final_norm else None

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions [T]; returns hidden states [T, E]."""
        bias = None if self.relative_bias is None else self.relative_bias()
        rules = AttentionRules(scale=self.attention_scale, causal=False, relative_bias=bias)
        hidden: Tensor = self.embedding(ids, positions)
        for layer in self.layers:
            hidden = layer(hidden, attend, rules)
        return hidden if self.norm is None else self.norm(hidden)


class Decoder(nn.Module):
    def __init__(self, config: EncoderDecoderConfig, device: Device) -> None:
        super().__init__()
        norm_first = config.target_norm_before_positions
        self.embedding = InputEmbedding(config, config.vocab_size, device, norm_before_positions=norm_first)
        self.attention_scale = config.attention_scale
        relative = config.positions == "relative" and config.shared_relative_bias
        self.relative_bias = RelativeBias(config, config.num_heads, two_sided=False) if relative else None
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = make_norm(config) if config.final_norm else None
        self.cross_rules = AttentionRules(scale=config.attention_scale, causal=False)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, cross: CrossAttend) -> Tensor:
        """ids and positions [T]; returns hidden states [T, E]."""
        bias = None if self.relative_bias is None else self.relative_bias()
        rules = AttentionRules(scale=self.attention_scale, relative_bias=bias)
        hidden: Tensor = self.embedding(ids, positions)
        for layer in self.layers:
            hidden = layer(hidden, attend, rules, cross, self.cross_rules)
        return hidden if self.norm is None else self.norm(hidden)

    def cross_attentions(self) -> list["CrossAttention"]:
        return [layer.cross_attention for layer in self.layers if isinstance(layer, DecoderLayer)]


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each a `Residual`."""

    def __init__(self, config: EncoderDecoderConfig, index: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config, index, config.num_encoder_heads, config.encoder_head_size)
        self.relative_bias = own_bias(config, config.num_encoder_heads, two_sided=True)
        self.attention_residual = Residual(config)
        self.mlp = make_mlp(config, config.encoder_intermediate_size)
        self.mlp_residual = Residual(config)

    def forward(self, hidden: Tensor, attend: Attend, rules: AttentionRules) -> Tensor:
        """hidden [T, E] in and out."""
        rules = rules if self.relative_bias is None else replace(rules, relative_bias=self.relative_bias())
        hidden = self.attention_residual(hidden, lambda x: self.attention(x, attend, rules))
        out: Tensor = self.mlp_residual(hidden, self.mlp)
        return out


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each a `Residual`."""

    def __init__(self, config: EncoderDecoderConfig, index: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config, index, config.num_heads, config.head_size)
        self.relative_bias = own_bias(config, config.num_heads, two_sided=False)
        self.attention_residual = Residual(config)
        self.cross_attention = CrossAttention(config, index)
        self.cross_residual = Residual(config)
        self.mlp = make_mlp(config, config.intermediate_size)
        self.mlp_residual = Residual(config)

    def forward(
        self, hidden: Tensor, attend: Attend, rules: AttentionRules, cross: CrossAttend, cross_rules: AttentionRules
    ) -> Tensor:
        """hidden [T, E] in and out."""
        rules = rules if self.relative_bias is None else replace(rules, relative_bias=self.relative_bias())
        hidden = self.attention_residual(hidden, lambda x: self.attention(x, attend, rules))
        hidden = self.cross_residual(hidden, lambda x: self.cross_attention(x, cross, cross_rules))
        out: Tensor = self.mlp_residual(hidden, self.mlp)
        return out


class Residual(nn.Module):
    """A sublayer around the residual stream: x + f(norm(x)), or norm(x + f(x)) as in arXiv 1706.03762."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.norm = make_norm(config)

    def forward(self, hidden: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """hidden [T, E] in and out."""
        if self.norm_first:
            return _finite(hidden + sublayer(self.norm(hidden)))
        normed: Tensor = self.norm(_finite(hidden + sublayer(hidden)))
        return normed


class SelfAttention(nn.Module):
    def __init__(self, config: EncoderDecoderConfig, index: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.index, self.num_heads, self.head_size = index, num_heads, head_size
        inner = num_heads * head_size
        self.query_key_value = Linear(config.hidden_size, 3 * inner, bias=config.bias)
        self.output = Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor, attend: Attend, rules: AttentionRules) -> Tensor:
        """hidden [T, E] in and out."""
        fused = self.query_key_value(hidden).view(len(hidden), 3, self.num_heads, self.head_size)
        query, key, value = fused.unbind(1)  # [T, H, D] each
        attended = attend(self.index, query, key, value, rules)
        out: Tensor = self.output(attended.reshape(len(hidden), -1))  # [T, H * D] -> [T, E]
        return out


class CrossAttention(nn.Module):
    """Queries from the target; keys and values, made once by `keys_values`, from the encoded source."""

    def __init__(self, config: EncoderDecoderConfig, index: int) -> None:
        super().__init__()
        self.index, self.num_heads, self.head_size = index, config.num_heads, config.head_size
        inner = config.num_heads * config.head_size
        self.query = Linear(config.hidden_size, inner, bias=config.bias)
        self.key_value = Linear(config.hidden_size, 2 * inner, bias=config.bias)
        self.output = Linear(inner, config.hidden_size, bias=config.bias)

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """encoded [T, E] to keys and values, both [T, H, D]."""
        fused = self.key_value(encoded).view(len(encoded), 2, self.num_heads, self.head_size)
        return fused[:, 0], fused[:, 1]

    def forward(self, hidden: Tensor, cross: CrossAttend, rules: AttentionRules) -> Tensor:
        """hidden [T, E] in and out."""
        query = self.query(hidden).view(len(hidden), self.num_heads, self.head_size)  # [T, H, D]
        attended = cross(self.index, query, rules)
        out: Tensor = self.output(attended.reshape(len(hidden), -1))  # [T, H * D] -> [T, E]
        return out


class InputEmbedding(nn.Module):
    """Token and absolute position embeddings of one side."""

    def __init__(
        self, config: EncoderDecoderConfig, vocab_size: int, device: Device, *, norm_before_positions: bool = False
    ) -> None:
        super().__init__()
        self.scale = config.embedding_scale
        self.norm_before_positions = norm_before_positions
        self.tokens = Embedding(vocab_size, config.hidden_size)
        self.offset = config.position_offset
        num_rows = config.num_positions + self.offset
        self.positions = Embedding(num_rows, config.hidden_size) if config.positions == "learned" else None
        self.table: Tensor | None = None
        if config.positions == "sinusoidal":
            self.table = marian_table(num_rows, config.hidden_size).to(device)
        elif config.positions == "tensor2tensor":
            self.table = tensor2tensor_table(num_rows, config.hidden_size).to(device)
        self.norm = make_norm(config) if config.embedding_norm else None

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions [T]; returns [T, E]."""
        hidden: Tensor = self.tokens(ids)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if self.norm is not None and self.norm_before_positions:
            hidden = self.norm(hidden)
        if self.positions is not None:
            hidden = hidden + self.positions(positions + self.offset)
        if self.table is not None:
            hidden = hidden + self.table[positions + self.offset].to(hidden.dtype)
        return hidden if self.norm is None or self.norm_before_positions else self.norm(hidden)


class RelativeBias(nn.Module):
    """T5's learned bias on attention scores by the distance between positions, of all layers of a side or of one."""

    def __init__(self, config: EncoderDecoderConfig, num_heads: int, *, two_sided: bool) -> None:
        super().__init__()
        self.weight = parameter(config.num_relative_buckets, num_heads)
        self.max_distance = config.max_relative_distance
        self.two_sided = two_sided

    def forward(self) -> Tensor:
        """[H, 2R + 1] float32, for distances -R to R; R = `max_distance`, from which on the bucket is the last."""
        reach = torch.arange(-self.max_distance, self.max_distance + 1, device=self.weight.device)
        buckets = relative_buckets(reach, len(self.weight), self.max_distance, two_sided=self.two_sided)
        return self.weight.float()[buckets].T.contiguous()


def own_bias(config: EncoderDecoderConfig, num_heads: int, *, two_sided: bool) -> RelativeBias | None:
    """A layer's, where they don't share one."""
    owns = config.positions == "relative" and not config.shared_relative_bias
    return RelativeBias(config, num_heads, two_sided=two_sided) if owns else None


def make_norm(config: EncoderDecoderConfig) -> RMSNorm | LayerNorm:
    norm = RMSNorm if config.norm == "rms" else LayerNorm
    return norm(config.hidden_size, config.norm_epsilon)


def make_mlp(config: EncoderDecoderConfig, intermediate_size: int) -> MLP | GatedMLP:
    mlp = GatedMLP if config.gated else MLP
    return mlp(config.hidden_size, intermediate_size, activation=config.activation, bias=config.bias)


def _finite(hidden: Tensor) -> Tensor:
    """In float16 the residual of T5 and BART may pass 65,504: clamped, as transformers does, so that no NaN arises."""
    return hidden.clamp(-65504.0, 65504.0) if hidden.dtype is torch.float16 else hidden
