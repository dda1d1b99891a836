"""OLMo (arXiv 2402.00838), its second (2501.00656) and its third onto `DecoderConfig`.

All are Llama but for norms: the first one's have learned nothing; the others' are on the sublayers' outputs, and on
queries and keys.
"""

from dataclasses import replace

from model.architectures.llama import configure_llama, decoder, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import DecoderConfig, Rotary

OLMO3_DEFAULTS = {"sliding_window": 4096, "rope_theta": 500_000.0}


def configure_olmo(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(
        configure_llama(raw, limit),
        architecture="OlmoForCausalLM",
        norm="layer",
        norm_epsilon=1e-5,
        norm_weight=False,
        norm_bias=False,
        query_key_value_clip=raw.number("clip_qkv") if "clip_qkv" in raw else None,
        mlp_bias=False,
    )


def configure_olmo2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(
        configure_llama(raw, limit),
        architecture="Olmo2ForCausalLM",
        norm_epsilon=raw.number("rms_norm_eps", 1e-5),
        norm_places="after",
        query_key_norm="full",
    )


def configure_olmo3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, OLMO3_DEFAULTS)
    config = configure_olmo2(raw, limit)
    return replace(
        config,
        architecture="Olmo3ForCausalLM",
        windows=windows(raw, optional_window(raw), lambda layer: (layer + 1) % 4 != 0),
        rotary=rotary(raw, config.head_size, length=config.context_length, layer_type="full_attention"),
        local_rotary=_local_rotary(raw, config),
    )


def _local_rotary(raw: RawConfig, config: DecoderConfig) -> Rotary:
    """Positions of the sliding layers, which are not stretched unless they have a section of their own."""
    if "rope_parameters" in raw and "sliding_attention" in raw.section("rope_parameters"):
        return rotary(raw, config.head_size, length=config.context_length, layer_type="sliding_attention")
    assert config.rotary is not None
    return replace(config.rotary, scaling=None)


ARCHITECTURES = {
    "OlmoForCausalLM": decoder(configure_olmo),
    "Olmo2ForCausalLM": decoder(configure_olmo2),
    "Olmo3ForCausalLM": decoder(configure_olmo3),
}
