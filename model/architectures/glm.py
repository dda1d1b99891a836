"""GLM-4 and its release of April 2025 (`Glm`, `Glm4`) onto `DecoderConfig`: Llama with rotary positions in pairs of
neighbours on half of a head and gate and up stored as one; the second has norms on its sublayers' outputs, too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import Renamed, configure_llama, weights, with_defaults
from model.architectures.mapping import Architecture, WeightMap, part
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

GLM_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def configure_glm(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_llama(with_defaults(raw, GLM_DEFAULTS), limit)
    return replace(config, architecture="GlmForCausalLM", attention_output_bias=False, mlp_bias=False)


def configure_glm4(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(configure_glm(raw, limit), architecture="Glm4ForCausalLM", norm_places="around")


AROUND: Renamed = (
    (".post_attention_layernorm.", ".pre_feedforward_layernorm."),
    (".post_self_attn_layernorm.", ".post_attention_layernorm."),
    (".post_mlp_layernorm.", ".post_feedforward_layernorm."),
)


def weights_glm(config: DecoderConfig) -> WeightMap:
    plain = weights(config, renamed=AROUND if config.norm_places == "around" else (), paired=True)
    fused = {
        f"layers.{layer}.mlp.gate_up.weight": part(f"model.layers.{layer}.mlp.gate_up_proj.weight")
        for layer in range(config.num_layers)
    }
    return replace(plain, parameters=plain.parameters | fused)


ARCHITECTURES = {
    "GlmForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_glm, weights=weights_glm
    ),
    "Glm4ForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_glm4, weights=weights_glm
    ),
}
