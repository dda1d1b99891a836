"""BART, MVP and PLBart, and what their kin share: tensor names, and one config that each changes in a few places.

Maps `config.json` and stored names onto `EncoderDecoderConfig` and `model.encoder_decoder`'s parameters; knows no
tensors. mBART, Marian, M2M100, Pegasus and Blenderbot are in their own files.
"""

from dataclasses import replace

from model.architectures.encoders import num_labels, only
from model.architectures.llama import ACTIVATIONS, context_length, with_defaults
from model.architectures.mapping import Architecture, Part, WeightMap, part, parts
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig, HeadConfig

TOKENS = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
"""Names of one matrix: whichever are stored stand for those that are not."""

LOGITS_BIAS = "final_logits_bias"

SINUSOIDS = (r"model\.(encoder|decoder)\.embed_positions\.weights?",)
"""Stored by old conversions; the formula gives the same numbers."""


PLBART_DEFAULTS = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "scale_embedding": True,
}
"""What an absent key means to PLBart, where it is not what it means for BART."""


def configure(raw: RawConfig, limit: int | None, *, most: int | None = None) -> EncoderDecoderConfig:
    width = raw.size("d_model", 1024)
    num_heads, num_encoder_heads = raw.size("decoder_attention_heads", 16), raw.size("encoder_attention_heads", 16)
    for key, count in (("decoder_attention_heads", num_heads), ("encoder_attention_heads", num_encoder_heads)):
        if width % count:
            raise raw.wrong(key, f"a divisor of the {width} of d_model")
    num_positions = raw.size("max_position_embeddings", 1024)
    length = context_length(raw, limit, trained=num_positions, most=most)
    return EncoderDecoderConfig(
        architecture="BartForConditionalGeneration",
        vocab_size=raw.size("vocab_size"),
        hidden_size=width,
        num_layers=raw.size("decoder_layers", 12),
        num_heads=num_heads,
        head_size=width // num_heads,
        intermediate_size=raw.size("decoder_ffn_dim", 4096),
        num_encoder_layers=raw.size("encoder_layers", 12),
        num_encoder_heads=num_encoder_heads,
        encoder_head_size=width // num_encoder_heads,
        encoder_intermediate_size=raw.size("encoder_ffn_dim", 4096),
        context_length=length,
        embedding_norm=True,
        num_positions=max(num_positions, length),
        position_offset=2,
        attention_scale=(width // num_heads) ** -0.5,
        encoder_attention_scale=(width // num_encoder_heads) ** -0.5,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu"),
        embedding_scale=width**0.5 if raw.flag("scale_embedding", False) else 1.0,
        logits_bias=True,
    )


def configure_mvp(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    only(raw, {"use_prompt": False})
    return replace(configure(raw, limit), architecture="MvpForConditionalGeneration")


def configure_plbart(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    return replace(configure(with_defaults(raw, PLBART_DEFAULTS), limit), architecture="PLBartForConditionalGeneration")


def configure_classifier(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    """bart-large-mnli and its like: the decoder reads the source once more, and its last state is classified."""
    return replace(
        configure(raw, limit),
        architecture="BartForSequenceClassification",
        logits_bias=False,
        target_start_id=raw.whole("decoder_start_token_id", raw.whole("eos_token_id", 2)),
        head=HeadConfig(kind="sequence", num_outputs=num_labels(raw), pooling="last", dense=True, activation="tanh"),
    )


def weights(config: EncoderDecoderConfig) -> WeightMap:
    parameters = {"output.weight": part("lm_head.weight")}
    for side in ("encoder", "decoder"):
        parameters[f"{side}.embedding.tokens.weight"] = part(f"model.{side}.embed_tokens.weight")
        if config.positions == "learned":
            parameters[f"{side}.embedding.positions.weight"] = part(f"model.{side}.embed_positions.weight")
        if config.embedding_norm:
            parameters |= both(f"{side}.embedding.norm", f"model.{side}.layernorm_embedding")
        if config.final_norm:
            parameters |= both(f"{side}.norm", f"model.{side}.layer_norm")
    for layer in range(config.num_encoder_layers):
        parameters |= _layer(f"encoder.layers.{layer}", f"model.encoder.layers.{layer}")
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.decoder.layers.{layer}"
        parameters |= _layer(ours, theirs) | _cross_attention(ours, f"{theirs}.encoder_attn")
    if config.logits_bias:
        parameters["logits_bias"] = part(LOGITS_BIAS)
    return WeightMap(
        parameters=parameters,
        aliases=(TOKENS,),
        zeros=(LOGITS_BIAS,),
        ignored=() if config.positions == "learned" else SINUSOIDS,
        prefix="model.",
    )


def classifier_weights(config: EncoderDecoderConfig) -> WeightMap:
    shared = weights(config)
    kept = {name: sources for name, sources in shared.parameters.items() if name != "output.weight"}
    head = both("head.dense", "classification_head.dense") | both("head.output", "classification_head.out_proj")
    return replace(shared, parameters=kept | head, ignored=(*shared.ignored, LOGITS_BIAS))


def both(ours: str, *theirs: str) -> dict[str, tuple[Part, ...]]:
    """A parameter's weight and bias; of several stored ones below each other."""
    return {f"{ours}.{kind}": parts(*(f"{name}.{kind}" for name in theirs)) for kind in ("weight", "bias")}


def _layer(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    attention = f"{theirs}.self_attn"
    return {
        **both(f"{ours}.attention.query_key_value", *(f"{attention}.{x}_proj" for x in "qkv")),
        **both(f"{ours}.attention.output", f"{attention}.out_proj"),
        **both(f"{ours}.attention_residual.norm", f"{attention}_layer_norm"),
        **both(f"{ours}.mlp.up", f"{theirs}.fc1"),
        **both(f"{ours}.mlp.down", f"{theirs}.fc2"),
        **both(f"{ours}.mlp_residual.norm", f"{theirs}.final_layer_norm"),
    }


def _cross_attention(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    return {
        **both(f"{ours}.cross_attention.query", f"{theirs}.q_proj"),
        **both(f"{ours}.cross_attention.key_value", f"{theirs}.k_proj", f"{theirs}.v_proj"),
        **both(f"{ours}.cross_attention.output", f"{theirs}.out_proj"),
        **both(f"{ours}.cross_residual.norm", f"{theirs}_layer_norm"),
    }


ARCHITECTURES = {
    "BartForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=weights
    ),
    "MvpForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure_mvp, weights=weights
    ),
    "PLBartForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure_plbart, weights=weights
    ),
    "BartForSequenceClassification": Architecture(
        network="encoder", head="sequence_classification", configure=configure_classifier, weights=classifier_weights
    ),
}
