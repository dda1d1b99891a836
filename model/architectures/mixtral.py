"""Mixtral (arXiv 2401.04088) onto `DecoderConfig`: Mistral with experts in every layer."""

from dataclasses import replace

from model.architectures.llama import configure_llama, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.architectures.sparse import SparseNames, num_chosen, num_experts, sparse_decoder
from model.config import DecoderConfig, ExpertsConfig

MIXTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}


def configure_mixtral(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, MIXTRAL_DEFAULTS)
    plain = configure_llama(raw, limit)
    count = num_experts(raw, 8)
    return replace(
        plain,
        architecture="MixtralForCausalLM",
        windows=windows(raw, optional_window(raw)),
        experts=ExpertsConfig(
            num_experts=count,
            num_chosen=num_chosen(raw, count, 2),
            intermediate_size=plain.intermediate_size,
            layers=frozenset(range(plain.num_layers)),
            normalized=True,
        ),
    )


NAMES = SparseNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")

ARCHITECTURES = {"MixtralForCausalLM": sparse_decoder(configure_mixtral, NAMES)}
