"""T5, T5 1.1, FLAN-T5, mT5 and UMT5: relative positions, RMSNorm, no biases, scores without a scale (arXiv 1910.10683).

Maps `config.json` and stored names onto `EncoderDecoderConfig` and `model.encoder_decoder`'s parameters; knows no
tensors.
"""

from collections.abc import Callable
from dataclasses import replace

from model.architectures.llama import ACTIVATIONS, UNBOUNDED, context_length, with_defaults
from model.architectures.mapping import Architecture, Part, WeightMap, part, parts
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig

IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
"""Written by the first conversions and never used: cross-attention has no relative positions."""

TOKENS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
"""Names of one matrix: whichever are stored stand for those that are not."""


Configure = Callable[[RawConfig, int | None], EncoderDecoderConfig]

UMT5_DEFAULTS = {"d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
"""What an absent key means to UMT5, where it is not what it means for T5."""


def configure(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    width, num_heads, num_layers = raw.size("d_model", 512), raw.size("num_heads", 8), raw.size("num_layers", 6)
    # T5 1.1 said that its output matrix is its own; transformers 5 ties by what is stored and kept that
    # statement for what it has always decided too: whether the logits are scaled.
    scaled = raw.flag("scale_decoder_outputs", raw.flag("tie_word_embeddings", True))
    gate, _, activation = raw.text("feed_forward_proj", "relu").rpartition("-")
    if gate not in ("", "gated") or activation not in ACTIVATIONS:
        raise raw.wrong("feed_forward_proj", f"one of {', '.join(ACTIVATIONS)}, with or without 'gated-' before it")
    return EncoderDecoderConfig(
        architecture="T5ForConditionalGeneration",
        vocab_size=raw.size("vocab_size"),
        hidden_size=width,
        num_layers=raw.size("num_decoder_layers", num_layers),
        num_heads=num_heads,
        head_size=raw.size("d_kv", 64),
        intermediate_size=raw.size("d_ff", 2048),
        num_encoder_layers=num_layers,
        num_encoder_heads=num_heads,
        encoder_head_size=raw.size("d_kv", 64),
        encoder_intermediate_size=raw.size("d_ff", 2048),
        context_length=context_length(raw, limit, trained=raw.size("n_positions", 512), most=UNBOUNDED),
        norm="rms",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-6),
        norm_first=True,
        final_norm=True,
        bias=False,
        positions="relative",
        num_relative_buckets=raw.size("relative_attention_num_buckets", 32),
        max_relative_distance=raw.size("relative_attention_max_distance", 128),
        attention_scale=1.0,
        encoder_attention_scale=1.0,
        # "gated-gelu" has always meant the approximation by tanh.
        activation="gelu_tanh" if gate and activation == "gelu" else ACTIVATIONS[activation],
        gated=bool(gate),
        logit_scale=width**-0.5 if scaled else 1.0,
    )


def configure_mt5(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    """mT5's logits are never scaled, whatever its config says of ties."""
    return replace(configure(raw, limit), architecture="MT5ForConditionalGeneration", logit_scale=1.0)


def configure_umt5(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    """Each layer has a bias of its own (arXiv 2304.09151). Checkpoints that say that nothing is tied were trained
    without a scale of the logits; transformers 5 ties and scales all of them."""
    return replace(
        configure(with_defaults(raw, UMT5_DEFAULTS), limit),
        architecture="UMT5ForConditionalGeneration",
        shared_relative_bias=False,
    )


def weights(config: EncoderDecoderConfig) -> WeightMap:
    parameters = {
        "encoder.embedding.tokens.weight": part("encoder.embed_tokens.weight"),
        "decoder.embedding.tokens.weight": part("decoder.embed_tokens.weight"),
        "output.weight": part("lm_head.weight"),
    }
    for side in ("encoder", "decoder"):
        if config.shared_relative_bias:
            parameters[f"{side}.relative_bias.weight"] = _bias(f"{side}.block.0.layer.0")
        parameters[f"{side}.norm.weight"] = part(f"{side}.final_layer_norm.weight")
    for layer in range(config.num_encoder_layers):
        ours, theirs = f"encoder.layers.{layer}", f"encoder.block.{layer}.layer"
        parameters |= _self_attention(config, ours, f"{theirs}.0") | _mlp(config, ours, f"{theirs}.1")
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"decoder.block.{layer}.layer"
        parameters |= _self_attention(config, ours, f"{theirs}.0") | _cross_attention(ours, f"{theirs}.1")
        parameters |= _mlp(config, ours, f"{theirs}.2")
    return WeightMap(parameters=parameters, ignored=IGNORED, aliases=(TOKENS,))


def _bias(attention: str) -> tuple[Part, ...]:
    return part(f"{attention}.SelfAttention.relative_attention_bias.weight")


def _self_attention(config: EncoderDecoderConfig, ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    own_bias = {} if config.shared_relative_bias else {f"{ours}.relative_bias.weight": _bias(theirs)}
    return own_bias | {
        f"{ours}.attention.query_key_value.weight": parts(*(f"{theirs}.SelfAttention.{x}.weight" for x in "qkv")),
        f"{ours}.attention.output.weight": part(f"{theirs}.SelfAttention.o.weight"),
        f"{ours}.attention_residual.norm.weight": part(f"{theirs}.layer_norm.weight"),
    }


def _cross_attention(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    return {
        f"{ours}.cross_attention.query.weight": part(f"{theirs}.EncDecAttention.q.weight"),
        f"{ours}.cross_attention.key_value.weight": parts(*(f"{theirs}.EncDecAttention.{x}.weight" for x in "kv")),
        f"{ours}.cross_attention.output.weight": part(f"{theirs}.EncDecAttention.o.weight"),
        f"{ours}.cross_residual.norm.weight": part(f"{theirs}.layer_norm.weight"),
    }


def _mlp(config: EncoderDecoderConfig, ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    dense = f"{theirs}.DenseReluDense"
    up = {f"{ours}.mlp.up.weight": part(f"{dense}.wi.weight")}
    gate_up = {f"{ours}.mlp.gate_up.weight": parts(f"{dense}.wi_0.weight", f"{dense}.wi_1.weight")}
    return (gate_up if config.gated else up) | {
        f"{ours}.mlp.down.weight": part(f"{dense}.wo.weight"),
        f"{ours}.mlp_residual.norm.weight": part(f"{theirs}.layer_norm.weight"),
    }


def encoder_weights(config: EncoderDecoderConfig) -> WeightMap:
    """Those of the encoder alone; a decoder that is stored beside it is not used."""
    shared = weights(config)
    kept = {name: sources for name, sources in shared.parameters.items() if name.startswith("encoder.")}
    return replace(shared, parameters=kept, ignored=(*IGNORED, r"decoder\..*"))


def _encoder(configure: Configure) -> Architecture[EncoderDecoderConfig]:
    """The row of an encoder without a decoder, whose layers are none."""

    def configured(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
        return replace(configure(raw, limit), num_layers=0)

    return Architecture(network="encoder", head="embedding", configure=configured, weights=encoder_weights)


ENCODERS = {
    "T5EncoderModel": _encoder(configure),
    "MT5EncoderModel": _encoder(configure_mt5),
    "UMT5EncoderModel": _encoder(configure_umt5),
}

ARCHITECTURES = {
    "T5ForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=weights
    ),
    "MT5ForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure_mt5, weights=weights
    ),
    "UMT5ForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure_umt5, weights=weights
    ),
}
