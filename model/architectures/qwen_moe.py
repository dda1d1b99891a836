"""The mixtures of experts of Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388) onto `DecoderConfig`."""

from dataclasses import replace

from model.architectures.llama import QWEN2_DEFAULTS, configure_llama, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.architectures.sparse import SparseNames, num_chosen, num_experts, sparse_decoder, sparse_layers
from model.config import DecoderConfig, ExpertsConfig

QWEN2_MOE_DEFAULTS = {**QWEN2_DEFAULTS, "num_key_value_heads": 16}
QWEN3_MOE_DEFAULTS = {**QWEN2_DEFAULTS, "num_key_value_heads": 4}


def configure_qwen2_moe(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, QWEN2_MOE_DEFAULTS)
    first_whole = raw.whole("max_window_layers", 28)
    experts = _experts(raw, count=60, chosen=4, size=1408)
    return replace(
        configure_llama(raw, limit),
        architecture="Qwen2MoeForCausalLM",
        windows=windows(raw, _window(raw), lambda layer: layer % 2 == 0 and layer < first_whole),
        query_key_value_bias=raw.flag("qkv_bias", True),
        attention_output_bias=False,
        experts=replace(experts, shared_size=raw.size("shared_expert_intermediate_size", 5632), shared_gate=True),
    )


def configure_qwen3_moe(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, QWEN3_MOE_DEFAULTS)
    return replace(
        configure_llama(raw, limit),
        architecture="Qwen3MoeForCausalLM",
        windows=windows(raw, _window(raw)),
        query_key_norm="head",
        experts=_experts(raw, count=128, chosen=8, size=768),
    )


def _window(raw: RawConfig) -> int | None:
    return optional_window(raw) if raw.flag("use_sliding_window", False) else None


def _experts(raw: RawConfig, *, count: int, chosen: int, size: int) -> ExpertsConfig:
    """The numbers are those of the class in transformers, for keys that a `config.json` leaves out."""
    count = num_experts(raw, count)
    return ExpertsConfig(
        num_experts=count,
        num_chosen=num_chosen(raw, count, chosen),
        intermediate_size=raw.size("moe_intermediate_size", size),
        layers=sparse_layers(raw),
        normalized=raw.flag("norm_topk_prob", False),
    )


ARCHITECTURES = {
    "Qwen2MoeForCausalLM": sparse_decoder(configure_qwen2_moe, SparseNames()),
    "Qwen3MoeForCausalLM": sparse_decoder(configure_qwen3_moe, SparseNames()),
}
