"""OLMoE (arXiv 2409.02060) onto `DecoderConfig`: Llama with QK-norm, and experts in every layer."""

from dataclasses import replace

from model.architectures.llama import configure_llama, with_defaults
from model.architectures.raw import RawConfig
from model.architectures.sparse import SparseNames, num_chosen, num_experts, sparse_decoder
from model.config import DecoderConfig, ExpertsConfig

OLMOE_DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def configure_olmoe(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, OLMOE_DEFAULTS)
    if "clip_qkv" in raw:
        raise raw.wrong("clip_qkv", "null: queries, keys and values that are clipped are not supported")
    plain = configure_llama(raw, limit)
    count = num_experts(raw, 64)
    return replace(
        plain,
        architecture="OlmoeForCausalLM",
        query_key_norm="full",
        experts=ExpertsConfig(
            num_experts=count,
            num_chosen=num_chosen(raw, count, 8),
            intermediate_size=plain.intermediate_size,
            layers=frozenset(range(plain.num_layers)),
            normalized=raw.flag("norm_topk_prob", False),
        ),
    )


ARCHITECTURES = {"OlmoeForCausalLM": sparse_decoder(configure_olmoe, SparseNames())}
