"""Persimmon onto `DecoderConfig`: LayerNorms, of queries and keys, too, and the square of a ReLU.

The fused projection is stored head by head and is regrouped. Knows no tensors.
"""

from dataclasses import replace

from model.architectures.llama import configure_llama, weights, with_defaults
from model.architectures.mapping import Architecture, HeadOrder, Part, WeightMap, grouped_heads
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

PERSIMMON_DEFAULTS = {"hidden_act": "relu2", "max_position_embeddings": 16384, "partial_rotary_factor": 0.5}


def configure_persimmon(raw: RawConfig, limit: int | None) -> DecoderConfig:
    # All of its heads have keys and values of their own, whatever the key says.
    every = RawConfig({**raw.values, "num_key_value_heads": None}, raw.file)
    return replace(
        configure_llama(with_defaults(every, PERSIMMON_DEFAULTS), limit),
        architecture="PersimmonForCausalLM",
        norm="layer",
        norm_epsilon=raw.number("layer_norm_eps", 1e-5),
        query_key_norm="head" if raw.flag("qk_layernorm", True) else None,
        query_key_value_bias=True,
        attention_output_bias=True,
        gated=False,
        mlp_bias=True,
    )


RENAMED = (
    (".self_attn.dense.", ".self_attn.o_proj."),
    (".self_attn.q_layernorm.", ".self_attn.q_norm."),
    (".self_attn.k_layernorm.", ".self_attn.k_norm."),
    (".mlp.dense_h_to_4h.", ".mlp.up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
    ("final_layernorm.", "norm."),
)


def weights_persimmon(config: DecoderConfig) -> WeightMap:
    plain = weights(config, renamed=RENAMED)
    order = HeadOrder(head_size=config.head_size, heads=grouped_heads(config.num_heads, config.num_heads))
    fused = {
        f"layers.{layer}.attention.query_key_value.{kind}": (
            Part(name=f"model.layers.{layer}.self_attn.query_key_value.{kind}", order=order),
        )
        for layer in range(config.num_layers)
        for kind in ("weight", "bias")
    }
    return replace(plain, parameters=plain.parameters | fused)


ARCHITECTURES = {
    "PersimmonForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_persimmon, weights=weights_persimmon
    )
}
