"""EuroBERT (arXiv 2503.05500): Llama's layers, in which each token sees all others.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from model.architectures.encoders import (
    Kind,
    biased,
    family,
    fused,
    head_size,
    masked_lm,
    num_labels,
    only,
    plain_head,
    tied_head,
    without,
)
from model.architectures.llama import (
    ACTIVATIONS,
    IGNORED,
    context_length,
    heads,
    most_positions,
    with_aliases,
    with_defaults,
)
from model.architectures.mapping import Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import EncoderConfig, HeadConfig

DEFAULTS = {"hidden_size": 768, "num_attention_heads": 12}

ALIASES = {"classifier_pooling": "clf_pooling"}
"""As the authors' code calls it."""

POOLING = {"bos": "first", "mean": "mean", "late": "late"}


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    raw = with_aliases(with_defaults(raw, DEFAULTS), ALIASES)
    hidden_size = raw.size("hidden_size")
    num_heads, num_kv_heads, _ = heads(raw)
    size = head_size(raw, hidden_size, num_heads)
    only(raw, {"head_dim": size})
    trained = raw.size("max_position_embeddings", 8192)
    length = context_length(raw, limit, trained=trained, most=most_positions(raw, trained))
    return EncoderConfig(
        architecture="EuroBertModel",
        vocab_size=raw.size("vocab_size", 128256),
        hidden_size=hidden_size,
        intermediate_size=raw.size("intermediate_size", 3072),
        num_layers=raw.size("num_hidden_layers", 12),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        context_length=length,
        embedding_size=hidden_size,
        learned_positions=False,
        embedding_norm=False,
        norm="rms",
        norm_epsilon=raw.number("rms_norm_eps", 1e-5),
        norm_bias=False,
        pre_norm=True,
        attention_bias=raw.flag("attention_bias", False),
        attention_scale=size**-0.5,
        rotary=rotary(raw, size, length=length),
        activation=raw.choice("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        mlp_bias=raw.flag("mlp_bias", False),
        head=None if kind is None else _head(raw, kind),
    )


def _head(raw: RawConfig, kind: Kind) -> HeadConfig:
    if kind == "vocabulary":
        vocab_size, bias = raw.size("vocab_size", 128256), raw.flag("mlp_bias", False)
        return HeadConfig(kind=kind, num_outputs=vocab_size, tied=raw.flag("tie_word_embeddings", False), bias=bias)
    if kind == "sequence":
        pooling = raw.choice("classifier_pooling", POOLING, "late")
        return HeadConfig(kind=kind, num_outputs=num_labels(raw), pooling=pooling, dense=True, activation="gelu")
    return plain_head(raw, kind)


def weights(config: EncoderConfig) -> WeightMap:
    parameters: dict[str, tuple[Part, ...]] = {
        "embedding.tokens.weight": part("model.embed_tokens.weight"),
        "norm.weight": part("model.norm.weight"),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, bias = f"{theirs}.self_attn", config.attention_bias
        parameters |= fused(f"{ours}.query_key_value", *(f"{attention}.{x}_proj" for x in "qkv"), bias=bias)
        parameters |= biased(f"{ours}.output", f"{attention}.o_proj", bias=bias)
        parameters |= biased(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False)
        halves = (f"{theirs}.mlp.{x}_proj" for x in ("gate", "up"))
        parameters |= fused(f"{ours}.mlp.gate_up", *halves, bias=config.mlp_bias)
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", bias=config.mlp_bias)
        parameters |= biased(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=False)
    ignored: tuple[str, ...] = IGNORED
    if config.head is None:
        ignored = (*ignored, r"(lm_head|dense|classifier)\..*")
    elif config.head.kind == "vocabulary":
        parameters |= biased("head.output", "lm_head", bias=config.head.bias)
    else:
        parameters |= biased("head.dense", "dense") if config.head.dense else {}
        parameters |= biased("head.output", "classifier")
    return WeightMap(parameters=parameters, ignored=ignored, prefix="model.", aliases=tied_head(config, parameters))


ARCHITECTURES = family("EuroBert", configure, weights, classes=without("ForQuestionAnswering"))
MASKED_LMS = masked_lm("EuroBert", configure, weights)
