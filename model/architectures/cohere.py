"""Command R and Aya (Cohere) and their second kind (Command R7B, Command A) onto `DecoderConfig`.

Attention and MLP side by side behind one LayerNorm without bias; rotary positions in pairs of neighbours, in the second
kind on the layers that have a window alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import configure_llama, decoder, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

COHERE_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 8192,
    "logit_scale": 0.0625,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
COHERE2_DEFAULTS: Mapping[str, Any] = {**COHERE_DEFAULTS, "rope_theta": 10_000.0, "sliding_window": 4096}


def configure_cohere(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, COHERE_DEFAULTS)
    return replace(
        configure_llama(raw, limit),
        architecture="CohereForCausalLM",
        norm="layer",
        norm_epsilon=raw.number("layer_norm_eps", 1e-5),
        norm_bias=False,
        parallel_residual=True,
        shared_norm=True,
        query_key_norm="heads" if raw.flag("use_qk_norm", False) else None,
        mlp_bias=False,
        logit_scale=raw.number("logit_scale"),
    )


def configure_cohere2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, COHERE2_DEFAULTS)
    pattern = raw.size("sliding_window_pattern", 4)
    found = windows(raw, optional_window(raw), lambda layer: (layer + 1) % pattern != 0)
    config = configure_cohere(raw, limit)
    slides = tuple(window is not None for window in found) if found else (False,) * config.num_layers
    return replace(config, architecture="Cohere2ForCausalLM", query_key_norm=None, windows=found, rotary_layers=slides)


ARCHITECTURES = {
    "CohereForCausalLM": decoder(configure_cohere, paired=True),
    "Cohere2ForCausalLM": decoder(configure_cohere2, paired=True),
}
