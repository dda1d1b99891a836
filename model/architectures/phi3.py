"""Phi-3 (and Phi-3.5, Phi-4-mini) onto `DecoderConfig`: Llama with its projections stored fused, and LongRoPE."""

from dataclasses import replace

from model.architectures.llama import configure_llama, optional_window, weights, windows, with_defaults
from model.architectures.mapping import Architecture, WeightMap, part
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

PHI3_DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def configure_phi3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, PHI3_DEFAULTS)
    return replace(
        configure_llama(raw, limit),
        architecture="Phi3ForCausalLM",
        norm_epsilon=raw.number("rms_norm_eps", 1e-5),
        windows=windows(raw, optional_window(raw)),
        query_key_value_bias=False,
        attention_output_bias=False,
    )


def weights_phi3(config: DecoderConfig) -> WeightMap:
    plain = weights(config)
    parameters = dict(plain.parameters)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        # Stored in our order: queries, keys, values; gate, up.
        parameters[f"{ours}.attention.query_key_value.weight"] = part(f"{theirs}.self_attn.qkv_proj.weight")
        parameters[f"{ours}.mlp.gate_up.weight"] = part(f"{theirs}.mlp.gate_up_proj.weight")
    return replace(plain, parameters=parameters)


ARCHITECTURES = {
    "Phi3ForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_phi3, weights=weights_phi3
    )
}
