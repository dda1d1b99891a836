"""StableLM (arXiv 2402.17834) onto `DecoderConfig`: Llama with LayerNorms and rotary positions on part of a head.

Its norms of queries and keys, if it has them, are one for each head, and stored so.
"""

from dataclasses import replace

from model.architectures.llama import configure_llama, weights, with_aliases, with_defaults
from model.architectures.mapping import Architecture, WeightMap, parts
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

EPOCH_ALIASES = {"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_pct"}
STABLELM_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25}


def configure_stablelm(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, STABLELM_DEFAULTS)
    parallel = raw.flag("use_parallel_residual", False)
    return replace(
        configure_llama(raw, limit),
        architecture="StableLmForCausalLM",
        norm="layer",
        norm_epsilon=raw.number("layer_norm_eps", 1e-5),
        parallel_residual=parallel,
        shared_norm=parallel,
        query_key_norm="heads" if raw.flag("qk_layernorm", False) else None,
        query_key_value_bias=raw.flag("use_qkv_bias", False),
        attention_output_bias=False,
        mlp_bias=False,
    )


def configure_epoch(raw: RawConfig, limit: int | None) -> DecoderConfig:
    """As StabilityAI's own code, of before transformers had it, names class and keys."""
    return configure_stablelm(with_aliases(raw, EPOCH_ALIASES), limit)


def weights_stablelm(config: DecoderConfig) -> WeightMap:
    plain = weights(config)
    if config.query_key_norm is None:
        return plain
    norms = {
        f"layers.{layer}.attention.{ours}.weight": parts(
            *(f"model.layers.{layer}.self_attn.{theirs}.norms.{head}.weight" for head in range(num_heads))
        )
        for layer in range(config.num_layers)
        for ours, theirs, num_heads in (
            ("query_norm", "q_layernorm", config.num_heads),
            ("key_norm", "k_layernorm", config.num_kv_heads),
        )
    }
    return replace(plain, parameters=plain.parameters | norms)


ARCHITECTURES = {
    name: Architecture(network="decoder", head="language_model", configure=configure, weights=weights_stablelm)
    for name, configure in (
        ("StableLmForCausalLM", configure_stablelm),
        ("StableLMEpochForCausalLM", configure_epoch),
    )
}
