"""The two networks as one trains them: plain PyTorch, top to bottom, with gradients, dropout and padding.

Module names are those of the Hugging Face checkpoints (`LlamaForCausalLM`, `BertModel`), so a state dict is a
checkpoint. The service serves these checkpoints with its own packed, cached networks and never imports this file;
tests hold both to the same logits. Runs in the training process.

B sequences, L tokens each, E hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama-type network with tied embeddings."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    context_length: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def hf_config(self, *, bos_id: int, eos_ids: list[int], pad_id: int) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "max_position_embeddings": self.context_length,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": bos_id,
            "eos_token_id": eos_ids,
            "pad_token_id": pad_id,
            "torch_dtype": "float32",
        }


def blocks(layers: nn.Module) -> Iterable[nn.Module]:
    """The members of a module list that a module dict holds, whose type checkers know only as a module."""
    assert isinstance(layers, nn.ModuleList)
    return layers


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotary_table(length: int, head_size: int, theta: float) -> Tensor:
    """cos and sin of every position and frequency, [2, length, D / 2]."""
    frequencies = theta ** (-torch.arange(0, head_size, 2).float() / head_size)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding, half-split pairing (i, i + D / 2) as in the Hugging Face layout; x is [B, H, L, D]."""
    cos, sin = table[:, : x.shape[-2]].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention of [B, H, L, D]; `visible` (True = may be seen) broadcasts to [B, H, L, L], default causal."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
    if visible is None:
        visible = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    # In bfloat16 on a CPU the plain form takes half the time of the fused kernel, forward and backward.
    hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + hidden  # [B, H, L, L]
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


class LlamaAttention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.num_heads, shape.num_kv_heads
        self.head_size = shape.hidden_size // shape.num_heads
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        b, length, _ = x.shape
        q = self.q_proj(x).view(b, length, self.heads, self.head_size).transpose(1, 2)  # [B, H, L, D]
        k = self.k_proj(x).view(b, length, self.kv_heads, self.head_size).transpose(1, 2)  # [B, K, L, D]
        v = self.v_proj(x).view(b, length, self.kv_heads, self.head_size).transpose(1, 2)  # [B, K, L, D]
        repeat = self.heads // self.kv_heads
        k = rotate(k, table).repeat_interleave(repeat, dim=1)  # [B, H, L, D]
        mixed = attention(rotate(q, table), k, v.repeat_interleave(repeat, dim=1))
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(b, length, -1))
        return out


class LlamaMLP(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LlamaLayer(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = LlamaAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = LlamaMLP(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), table))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Llama(nn.Module):
    """ids [B, L] -> hidden [B, L, E]; the logits are the hidden states against the embedding table."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(LlamaLayer(shape) for _ in range(shape.num_layers)),
                "norm": RMSNorm(shape.hidden_size, shape.norm_eps),
            }
        )
        table = rotary_table(shape.context_length, shape.hidden_size // shape.num_heads, shape.rope_theta)
        self.register_buffer("table", table, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # GPT-2's scheme: the two projections that write into the residual stream start smaller.
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.num_layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.model["embed_tokens"](ids)
        for layer in blocks(self.model["layers"]):
            x = layer(x, self.table)
        out: Tensor = self.model["norm"](x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        embedding = self.model["embed_tokens"]
        assert isinstance(embedding, nn.Embedding)
        return F.linear(hidden, embedding.weight.to(hidden.dtype))  # [B, L, V]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertShape:
    """The sizes of a BERT encoder without a pooler."""

    vocab_size: int
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_layers: int = 4
    num_heads: int = 12
    context_length: int = 512
    dropout: float = 0.1

    def hf_config(self) -> dict[str, object]:
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.context_length,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "attention_probs_dropout_prob": self.dropout,
            "hidden_dropout_prob": self.dropout,
            "initializer_range": 0.02,
            "pad_token_id": 0,
            "torch_dtype": "float32",
        }


class BertEmbeddings(nn.Module):
    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position_embeddings = nn.Embedding(shape.context_length, shape.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, ids: Tensor, type_ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(type_ids)
        x = x + self.position_embeddings.weight[: ids.shape[1]]
        out: Tensor = self.dropout(self.LayerNorm(x))
        return out


class BertSelfAttention(nn.Module):
    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.key = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.value = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, length, _ = x.shape
        q, k, v = (
            projection(x).view(b, length, self.heads, -1).transpose(1, 2)  # [B, H, L, D]
            for projection in (self.query, self.key, self.value)
        )
        mixed = attention(q, k, v, mask[:, None, None, :])
        return mixed.transpose(1, 2).reshape(b, length, -1)


class BertResidual(nn.Module):
    """dense, dropout, add, LayerNorm: the way both halves of a BERT layer end."""

    def __init__(self, inputs: int, shape: BertShape) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class BertLayer(nn.Module):
    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        attention = {"self": BertSelfAttention(shape), "output": BertResidual(shape.hidden_size, shape)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(shape.hidden_size, shape.intermediate_size)})
        self.output = BertResidual(shape.intermediate_size, shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class Bert(nn.Module):
    """ids [B, L], mask [B, L] (True = a token), type_ids [B, L] -> hidden [B, L, E]."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = BertEmbeddings(shape)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(shape) for _ in range(shape.num_layers))})

    @property
    def layers(self) -> list[BertLayer]:
        return [layer for layer in blocks(self.encoder["layer"]) if isinstance(layer, BertLayer)]

    def forward(self, ids: Tensor, mask: Tensor, type_ids: Tensor | None = None) -> Tensor:
        x: Tensor = self.embeddings(ids, torch.zeros_like(ids) if type_ids is None else type_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x
