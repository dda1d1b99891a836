"""Kin of Llama that need no file of their own: Seed-OSS, ERNIE 4.5, Helium, InternLM3, IQuest-Coder, CWM.

They differ in biases, in what a `config.json` that leaves keys out means, and in how heads lie in the file.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import configure_llama, decoder, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.architectures.rope import with_usual_scaling
from model.config import DecoderConfig

SEED_OSS_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
}
ERNIE4_5_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
HELIUM_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 20,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-8,
    "rope_theta": 100_000.0,
}
INTERNLM3_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
IQUESTCODER_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
CWM_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": 8192,
}
CWM_SCALING: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 16.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def configure_seed_oss(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(
        configure_llama(with_defaults(raw, SEED_OSS_DEFAULTS), limit),
        architecture="SeedOssForCausalLM",
        attention_output_bias=raw.flag("attention_out_bias", False),
    )


def configure_ernie4_5(raw: RawConfig, limit: int | None) -> DecoderConfig:
    bias = raw.flag("use_bias", False)
    return replace(
        configure_llama(with_defaults(raw, ERNIE4_5_DEFAULTS), limit),
        architecture="Ernie4_5ForCausalLM",
        query_key_value_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )


def configure_helium(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_llama(with_defaults(raw, HELIUM_DEFAULTS), limit)
    return replace(config, architecture="HeliumForCausalLM", attention_output_bias=False)


def configure_internlm3(raw: RawConfig, limit: int | None) -> DecoderConfig:
    """By its own names of biases, or those of Llama's class, as which transformers saves it."""
    bias = raw.flag("bias", raw.flag("mlp_bias", False))
    return replace(
        configure_llama(with_defaults(raw, INTERNLM3_DEFAULTS), limit),
        architecture="InternLM3ForCausalLM",
        query_key_value_bias=raw.flag("qkv_bias", raw.flag("attention_bias", False)),
        attention_output_bias=bias,
        mlp_bias=bias,
    )


def configure_iquestcoder(raw: RawConfig, limit: int | None) -> DecoderConfig:
    if "clip_qkv" in raw:
        raise raw.wrong("clip_qkv", "null")
    if raw.flag("use_sliding_window", False):
        raise raw.wrong("use_sliding_window", "false")
    config = configure_llama(with_defaults(raw, IQUESTCODER_DEFAULTS), limit)
    return replace(config, architecture="IQuestCoderForCausalLM")


def configure_cwm(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_usual_scaling(with_defaults(raw, CWM_DEFAULTS), CWM_SCALING)
    return replace(
        configure_llama(raw, limit),
        architecture="CwmForCausalLM",
        query_key_value_bias=False,
        attention_output_bias=False,
        windows=windows(raw, optional_window(raw), lambda layer: layer % 4 != 0),
    )


ARCHITECTURES = {
    "SeedOssForCausalLM": decoder(configure_seed_oss),
    "Ernie4_5ForCausalLM": decoder(configure_ernie4_5, paired=True),
    # As Baidu's own files name it.
    "Ernie4_5_ForCausalLM": decoder(configure_ernie4_5, paired=True),
    "HeliumForCausalLM": decoder(configure_helium, paired=True),
    "InternLM3ForCausalLM": decoder(configure_internlm3),
    "IQuestCoderForCausalLM": decoder(configure_iquestcoder),
    "CwmForCausalLM": decoder(configure_cwm),
}
