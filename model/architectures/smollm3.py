"""SmolLM3 onto `DecoderConfig`: Llama, every fourth layer of which knows nothing of positions (arXiv 2501.18795)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import configure_llama, decoder, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

SMOLLM3_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
}


def configure_smollm3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, SMOLLM3_DEFAULTS)
    rotates = _rotary_layers(raw)
    window = optional_window(raw) if raw.flag("use_sliding_window", False) else None
    return replace(
        configure_llama(raw, limit),
        architecture="SmolLM3ForCausalLM",
        rotary_layers=rotates,
        windows=windows(raw, window, lambda layer: not rotates[layer]),
    )


def _rotary_layers(raw: RawConfig) -> tuple[bool, ...]:
    """`no_rope_layers` has, other than its name says, 1 for those that have them."""
    num_layers = raw.size("num_hidden_layers")
    if "no_rope_layers" not in raw:
        interval = raw.size("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    found = raw.numbers("no_rope_layers")[:num_layers]
    if len(found) < num_layers or not set(found) <= {0, 1}:
        raise raw.wrong("no_rope_layers", f"{num_layers} times 0 or 1")
    return tuple(map(bool, found))


ARCHITECTURES = {"SmolLM3ForCausalLM": decoder(configure_smollm3)}
