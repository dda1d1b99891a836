"""Mistral Small 3.1 and later and Ministral 3 (their text parts) onto `DecoderConfig`: Mistral beside a vision tower.

Ministral 3's queries grow with their position, once the trained length is passed. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.beside_vision import weights_beside_vision
from model.architectures.llama import configure_mistral, decoder, with_defaults
from model.architectures.mapping import Architecture
from model.architectures.raw import RawConfig
from model.architectures.rope import with_usual_scaling
from model.config import DecoderConfig, QueryGrowth

MINISTRAL3_DEFAULTS: Mapping[str, Any] = {
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
MINISTRAL3_SCALING: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def configure_ministral3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    # All layers are alike, whatever `layer_types` says.
    raw = RawConfig({key: value for key, value in raw.values.items() if key != "layer_types"}, raw.file)
    raw = with_usual_scaling(with_defaults(raw, MINISTRAL3_DEFAULTS), MINISTRAL3_SCALING)
    section = raw.section("rope_parameters" if "rope_parameters" in raw else "rope_scaling")
    beta = section.number("llama_4_scaling_beta", 0.0)
    return replace(
        configure_mistral(raw, limit),
        architecture="Ministral3ForCausalLM",
        query_growth=QueryGrowth(beta=beta, length=section.size("original_max_position_embeddings")) if beta else None,
    )


TEXT_PARTS = {"mistral": configure_mistral, "ministral3": configure_ministral3}


def configure_mistral3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    text = raw.section("text_config")
    config: DecoderConfig = text.choice("model_type", TEXT_PARTS, "mistral")(text, limit)
    return replace(config, tied_embeddings=raw.flag("tie_word_embeddings", True))


ARCHITECTURES = {
    "Ministral3ForCausalLM": decoder(configure_ministral3),
    "Mistral3ForConditionalGeneration": Architecture(
        network="decoder", head="language_model", configure=configure_mistral3, weights=weights_beside_vision
    ),
}
