"""EXAONE 4 (arXiv 2507.11407) onto `DecoderConfig`: Llama with its norms on the sublayers' outputs and on queries and
keys, and, where most layers have a window, no positions on the others.
"""

from dataclasses import replace

from model.architectures.llama import configure_llama, decoder, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

EXAONE4_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "rms_norm_eps": 1e-5}


def configure_exaone4(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, EXAONE4_DEFAULTS)
    window, listed = optional_window(raw), "layer_types" in raw
    # Of those that list their layers the pattern may be letters ("LLLG").
    pattern = 1 if window is None or listed else raw.size("sliding_window_pattern", 4)
    found = windows(raw, window, lambda layer: (layer + 1) % pattern != 0)
    return replace(
        configure_llama(raw, limit),
        architecture="Exaone4ForCausalLM",
        norm_places="after",
        query_key_norm="head",
        query_key_value_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        windows=found,
        rotary_layers=tuple(width is not None for width in found),
    )


ARCHITECTURES = {"Exaone4ForCausalLM": decoder(configure_exaone4)}
