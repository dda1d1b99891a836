"""Gemma (arXiv 2403.08295), its second (2408.00118) and the text part of its third (2503.19786) onto `DecoderConfig`.

Tensor names are Llama's, since Gemma 2 with two more norms a layer; the larger Gemma 3 hold a vision tower beside the
text model, which is left out. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.beside_vision import weights_beside_vision
from model.architectures.llama import (
    ACTIVATIONS,
    configure_llama,
    decoder,
    optional_window,
    weights,
    windows,
    with_defaults,
)
from model.architectures.mapping import Architecture
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import DecoderConfig, Rotary

GEMMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA2_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3_DEFAULTS: Mapping[str, Any] = {
    **GEMMA2_DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
"""What a `config.json` that leaves these keys out means (Gemma 3's are short)."""


def configure_gemma(raw: RawConfig, limit: int | None) -> DecoderConfig:
    """Its first configs name the exact GELU, which was a mistake: it is always the one by tanh, as in transformers."""
    config = configure_llama(with_defaults(raw, GEMMA_DEFAULTS), limit)
    return replace(
        config,
        architecture="GemmaForCausalLM",
        norm_offset=1.0,
        activation="gelu_tanh",
        embedding_scale=config.hidden_size**0.5,
        embedding_scale_in_dtype=True,
    )


def configure_gemma2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, GEMMA2_DEFAULTS)
    return replace(
        _configure(raw, limit),
        architecture="Gemma2ForCausalLM",
        windows=windows(raw, optional_window(raw), lambda layer: layer % 2 == 0),
    )


def configure_vaultgemma(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(configure_gemma2(raw, limit), architecture="VaultGemmaForCausalLM", norm_places="before")


def configure_gemma3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, GEMMA3_DEFAULTS)
    config = _configure(raw, limit)
    pattern = raw.size("sliding_window_pattern", 6)
    window = optional_window(raw)
    if window is not None and not config.causal:
        # The stored number is the width of the whole window; ours counts one side and the token itself.
        window = raw.size("sliding_window") // 2 + 1
    return replace(
        config,
        architecture="Gemma3ForCausalLM",
        windows=windows(raw, window, lambda layer: (layer + 1) % pattern != 0),
        # QK-norm took the place of Gemma 2's cap on attention scores; the key lives on in configs and means nothing.
        attention_softcap=None,
        query_key_norm="head",
        rotary=rotary(raw, config.head_size, length=config.context_length, layer_type="full_attention"),
        local_rotary=_local_rotary(raw, config),
    )


def configure_gemma3_with_vision(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return configure_gemma3(raw.section("text_config"), limit)


def _configure(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_llama(raw, limit)
    caps = "attn_logit_softcapping", "final_logit_softcapping"
    attention_softcap, logit_softcap = (raw.number(key) if key in raw else None for key in caps)
    return replace(
        config,
        norm_offset=1.0,
        norm_places="around",
        attention_scale=raw.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
        activation=raw.choice("hidden_activation", ACTIVATIONS),
        embedding_scale=config.hidden_size**0.5,
        embedding_scale_in_dtype=True,
    )


def _local_rotary(raw: RawConfig, config: DecoderConfig) -> Rotary:
    """Positions of the sliding layers; older configs give only their base, and scale only the other layers."""
    nested = raw.section("rope_parameters") if "rope_parameters" in raw else RawConfig({}, raw.file)
    if "sliding_attention" in nested:
        return rotary(raw, config.head_size, length=config.context_length, layer_type="sliding_attention")
    return Rotary(theta=raw.number("rope_local_base_freq", 10000.0), size=config.head_size)


ARCHITECTURES = {
    "GemmaForCausalLM": decoder(configure_gemma),
    "Gemma2ForCausalLM": decoder(configure_gemma2),
    "VaultGemmaForCausalLM": decoder(
        configure_vaultgemma, renamed=((".pre_feedforward_layernorm.", ".post_attention_layernorm."),)
    ),
    "Gemma3ForCausalLM": decoder(configure_gemma3),
    # EmbeddingGemma.
    "Gemma3TextModel": Architecture(network="decoder", head="embedding", configure=configure_gemma3, weights=weights),
    "Gemma3TextForSequenceClassification": Architecture(
        network="decoder", head="sequence_classification", configure=configure_gemma3, weights=weights
    ),
    "Gemma3ForConditionalGeneration": Architecture(
        network="decoder",
        head="language_model",
        configure=configure_gemma3_with_vision,
        weights=weights_beside_vision,
    ),
}
