"""ModernBERT (arXiv 2412.13663): rotary positions, windows on most layers, gated MLPs, norms first, no biases.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.encoders import Kind, biased, family, head_size, masked_lm, num_labels, tied_head
from model.architectures.llama import ACTIVATIONS, context_length
from model.architectures.mapping import Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import EncoderConfig, HeadConfig, Rotary

GLOBAL_THETA, LOCAL_THETA = 160_000.0, 10_000.0


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    hidden_size, num_heads = raw.size("hidden_size", 768), raw.size("num_attention_heads", 12)
    size = head_size(raw, hidden_size, num_heads)
    length = context_length(raw, limit, trained=raw.size("max_position_embeddings", 8192))
    windows = _windows(raw)
    return EncoderConfig(
        architecture="ModernBertModel",
        vocab_size=raw.size("vocab_size", 50368),
        hidden_size=hidden_size,
        intermediate_size=raw.size("intermediate_size", 1152),
        num_layers=len(windows),
        num_heads=num_heads,
        context_length=length,
        embedding_size=hidden_size,
        learned_positions=False,
        norm_epsilon=raw.number("norm_eps", 1e-5),
        norm_bias=raw.flag("norm_bias", False),
        pre_norm=True,
        first_norm=False,
        attention_bias=raw.flag("attention_bias", False),
        attention_scale=size**-0.5,
        rotary=_rotary(raw, size, length, local=False),
        local_rotary=_rotary(raw, size, length, local=True),
        windows=windows,
        activation=raw.choice("hidden_activation", ACTIVATIONS, "gelu"),
        gated=True,
        mlp_bias=raw.flag("mlp_bias", False),
        head=None if kind is None else _head(raw, kind),
    )


def _windows(raw: RawConfig) -> tuple[int | None, ...]:
    """Half of `local_attention` lies on each side of a query: 128 means |i - j| <= 64, which is a window of 65."""
    num_layers = raw.size("num_hidden_layers", 22)
    window = raw.size("local_attention", 128) // 2 + 1
    if "layer_types" in raw:
        kinds = raw.texts("layer_types")
        if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise raw.wrong("layer_types", f"{num_layers} of full_attention, sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    every = raw.size("global_attn_every_n_layers", 3)
    return tuple(window if layer % every else None for layer in range(num_layers))


def _rotary(raw: RawConfig, size: int, length: int, *, local: bool) -> Rotary:
    """`rope_parameters` by kind of layer, or the older `global_rope_theta` and `local_rope_theta`."""
    if local:
        theta = raw.number("local_rope_theta", LOCAL_THETA)
        return rotary(raw, size, length=length, layer_type="sliding_attention", theta=theta)
    theta = raw.number("global_rope_theta", GLOBAL_THETA)
    return rotary(raw, size, length=length, layer_type="full_attention", theta=theta)


def _head(raw: RawConfig, kind: Kind) -> HeadConfig:
    sizes: dict[Kind, int] = {"span": 2, "vocabulary": raw.size("vocab_size", 50368)}
    head = HeadConfig(
        kind=kind,
        num_outputs=sizes[kind] if kind in sizes else num_labels(raw),
        dense=True,
        dense_bias=raw.flag("classifier_bias", False),
        activation=raw.choice("classifier_activation", ACTIVATIONS, "gelu"),
        norm=True,
        norm_bias=raw.flag("norm_bias", False),
        norm_epsilon=raw.number("norm_eps", 1e-5),
    )
    if kind == "vocabulary":
        return replace(head, bias=raw.flag("decoder_bias", True))
    pooling = raw.choice("classifier_pooling", {"cls": "first", "mean": "mean"}, "cls")
    return replace(head, pooling=pooling)


def weights(config: EncoderConfig) -> WeightMap:
    norm_bias, bias = config.norm_bias, config.attention_bias
    parameters: dict[str, tuple[Part, ...]] = {
        "embedding.tokens.weight": part("model.embeddings.tok_embeddings.weight"),
        **biased("embedding.norm", "model.embeddings.norm", bias=norm_bias),
        **biased("norm", "model.final_norm", bias=norm_bias),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        if layer > 0:
            parameters |= biased(f"{ours}.attention_norm", f"{theirs}.attn_norm", bias=norm_bias)
        parameters |= biased(f"{ours}.query_key_value", f"{theirs}.attn.Wqkv", bias=bias)
        parameters |= biased(f"{ours}.output", f"{theirs}.attn.Wo", bias=bias)
        parameters |= biased(f"{ours}.mlp_norm", f"{theirs}.mlp_norm", bias=norm_bias)
        parameters |= biased(f"{ours}.mlp.gate_up", f"{theirs}.mlp.Wi", bias=config.mlp_bias)
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.mlp.Wo", bias=config.mlp_bias)
    if config.head is None:
        return WeightMap(parameters=parameters, ignored=(r"(head|decoder|classifier)\..*",), prefix="model.")
    parameters |= biased("head.dense", "head.dense", bias=config.head.dense_bias)
    parameters |= biased("head.norm", "head.norm", bias=config.head.norm_bias)
    output = "decoder" if config.head.kind == "vocabulary" else "classifier"
    parameters |= biased("head.output", output, bias=config.head.bias)
    return WeightMap(parameters=parameters, prefix="model.", aliases=tied_head(config, parameters))


ARCHITECTURES = family("ModernBert", configure, weights)
MASKED_LMS = masked_lm("ModernBert", configure, weights)
