"""Nemotron and Minitron (arXiv 2407.14679), AFM (Arcee), Jais 2 and Apertus onto `DecoderConfig`.

Llama with a plain MLP, whose activation is the square of a ReLU, or in Apertus xIELU (arXiv 2411.13010).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import (
    DECODER_ACTIVATIONS,
    configure_llama,
    decoder,
    weights,
    with_defaults,
)
from model.architectures.mapping import Architecture, Part, WeightMap
from model.architectures.raw import RawConfig
from model.architectures.rope import with_usual_scaling
from model.config import DecoderConfig

NEMOTRON_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
}
ARCEE_DEFAULTS: Mapping[str, Any] = {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
JAIS2_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "relu2",
    "max_position_embeddings": 8192,
    "attention_bias": True,
    "mlp_bias": True,
}
APERTUS_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12_000_000.0,
}
APERTUS_SCALING: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def configure_nemotron(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_arcee(with_defaults(raw, NEMOTRON_DEFAULTS), limit)
    return replace(
        config,
        architecture="NemotronForCausalLM",
        norm="layer",
        norm_epsilon=raw.number("norm_eps", 1e-5),
        norm_offset=1.0,
    )


def configure_arcee(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_llama(with_defaults(raw, ARCEE_DEFAULTS), limit)
    return replace(config, architecture="ArceeForCausalLM", gated=False)


def configure_jais2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_arcee(with_defaults(raw, JAIS2_DEFAULTS), limit)
    return replace(
        config, architecture="Jais2ForCausalLM", norm="layer", norm_epsilon=raw.number("layer_norm_eps", 1e-5)
    )


def configure_apertus(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_usual_scaling(with_defaults(raw, APERTUS_DEFAULTS), APERTUS_SCALING)
    activation = raw.choice("hidden_act", {**DECODER_ACTIVATIONS, "xielu": "xielu"}, "xielu")
    plain = RawConfig({**raw.values, "hidden_act": None}, raw.file)
    return replace(
        configure_llama(plain, limit),
        architecture="ApertusForCausalLM",
        query_key_norm="head",
        activation=activation,
        gated=False,
        mlp_bias=False,
    )


APERTUS_NAMES = (("attention_layernorm.", "input_layernorm."), ("feedforward_layernorm.", "post_attention_layernorm."))
SLOPES = {"positive": "alpha_p", "negative": "alpha_n", "beta": "beta", "epsilon": "eps"}


def weights_apertus(config: DecoderConfig) -> WeightMap:
    plain = weights(config, renamed=APERTUS_NAMES)
    if config.activation != "xielu":
        return plain
    slopes = {
        f"layers.{layer}.mlp.activation.{ours}": (
            Part(name=f"model.layers.{layer}.mlp.act_fn.{theirs}", flattened=True),
        )
        for layer in range(config.num_layers)
        for ours, theirs in SLOPES.items()
    }
    return replace(plain, parameters=plain.parameters | slopes)


ARCHITECTURES = {
    "NemotronForCausalLM": decoder(configure_nemotron),
    "ArceeForCausalLM": decoder(configure_arcee),
    "Jais2ForCausalLM": decoder(configure_jais2),
    "ApertusForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_apertus, weights=weights_apertus
    ),
}
