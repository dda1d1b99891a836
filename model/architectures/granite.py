"""Granite and HyperCLOVA X SEED onto `DecoderConfig`: Llama with the scales of muP (arXiv 2203.03466)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import configure_llama, decoder, weights, with_defaults
from model.architectures.mapping import Architecture, WeightMap
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

GRANITE_DEFAULTS: Mapping[str, Any] = {"attention_multiplier": 1.0}


def configure_granite(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, GRANITE_DEFAULTS)
    scale = raw.number("logits_scaling", 1.0)
    if scale == 0:
        raise raw.wrong("logits_scaling", "a number other than 0")
    return replace(_configure(raw, limit), architecture="GraniteForCausalLM", logit_scale=1.0 / scale)


def configure_hyperclovax(raw: RawConfig, limit: int | None) -> DecoderConfig:
    """Logits are multiplied by what Granite divides them by."""
    return replace(
        _configure(raw, limit),
        architecture="HyperCLOVAXForCausalLM",
        logit_scale=raw.number("logits_scaling", 1.0),
        norm_places="around" if raw.flag("use_post_norm", True) else "before",
    )


def _configure(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_llama(raw, limit)
    return replace(
        config,
        embedding_scale=raw.number("embedding_multiplier", 1.0),
        residual_scale=raw.number("residual_multiplier", 1.0),
        attention_scale=raw.number("attention_multiplier", config.attention_scale),
    )


AROUND = (
    (".post_attention_layernorm.", ".pre_feedforward_layernorm."),
    (".post_norm1.", ".post_attention_layernorm."),
    (".post_norm2.", ".post_feedforward_layernorm."),
)


def weights_hyperclovax(config: DecoderConfig) -> WeightMap:
    return weights(config, renamed=AROUND if config.norm_places == "around" else ())


ARCHITECTURES = {
    "GraniteForCausalLM": decoder(configure_granite),
    "HyperCLOVAXForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_hyperclovax, weights=weights_hyperclovax
    ),
}
