"""GLM-4.5 (arXiv 2508.06471) and dots.llm1 (arXiv 2506.05767) onto `DecoderConfig`: experts as DeepSeek-V3 has them.

Shares are sigmoids, experts are chosen by them and a bias (arXiv 2412.19437), a shared expert computes every token, and
the first layers have none. DeepSeek's attention is another, and its choice among groups of experts is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import configure_llama, optional_window, windows, with_defaults
from model.architectures.mapping import Architecture, WeightMap
from model.architectures.raw import RawConfig
from model.architectures.sparse import SparseNames, num_chosen, sparse_decoder
from model.config import DecoderConfig, ExpertsConfig

GLM_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
DOTS_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "sliding_window": 4096,
    "max_window_layers": 62,
}
"""What a `config.json` that leaves these keys out means to transformers."""
READ: Mapping[str, tuple[Any, ...]] = {
    "n_group": (1,),
    "topk_group": (1,),
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid", "noaux_tc"),  # the second is the name of what the bias is for
    "topk_method": ("noaux_tc",),
}
"""What is read of keys that say how experts are chosen, where they are given."""


def configure_glm4_moe(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, GLM_DEFAULTS)
    return replace(
        configure_llama(raw, limit),
        architecture="Glm4MoeForCausalLM",
        attention_output_bias=False,
        query_key_norm="head" if raw.flag("use_qk_norm", False) else None,
        experts=_experts(raw),
    )


def configure_dots1(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, DOTS_DEFAULTS)
    first = raw.whole("max_window_layers")
    return replace(
        configure_llama(raw, limit),
        architecture="Dots1ForCausalLM",
        windows=windows(raw, optional_window(raw), lambda layer: layer >= first),
        query_key_norm="head",
        experts=_experts(raw),
    )


def _experts(raw: RawConfig) -> ExpertsConfig:
    for key, choices in READ.items():
        if key in raw and raw.values[key] not in choices:
            raise raw.wrong(key, " or ".join(map(repr, choices)))
    count, size = raw.size("n_routed_experts"), raw.size("moe_intermediate_size")
    return ExpertsConfig(
        num_experts=count,
        num_chosen=num_chosen(raw, count),
        intermediate_size=size,
        layers=frozenset(range(raw.whole("first_k_dense_replace"), raw.size("num_hidden_layers"))),
        scores="sigmoid",
        normalized=raw.flag("norm_topk_prob"),
        scale=raw.number("routed_scaling_factor", 1.0),
        selection_bias=True,
        shared_size=size * raw.size("n_shared_experts"),
    )


DOTS = sparse_decoder(configure_dots1, SparseNames(shared="shared_experts"))
GLM = sparse_decoder(configure_glm4_moe, SparseNames(shared="shared_experts"))


def weights_glm4_moe(config: DecoderConfig) -> WeightMap:
    """Behind the last layer a checkpoint may have one that guesses the token after the next, which is not used."""
    plain = GLM.weights(config)
    return replace(plain, ignored=(*plain.ignored, rf"model\.layers\.{config.num_layers}\..*"))


ARCHITECTURES: dict[str, Architecture[DecoderConfig]] = {
    "Glm4MoeForCausalLM": replace(GLM, weights=weights_glm4_moe),
    "Dots1ForCausalLM": DOTS,
}
