"""BLOOM (arXiv 2211.05100) onto `DecoderConfig`: ALiBi, and a norm behind the embedding.

The fused projection is stored head by head and is regrouped. Knows no tensors.
"""

from model.architectures.llama import UNBOUNDED, context_length, with_aliases
from model.architectures.mapping import Architecture, HeadOrder, WeightMap, grouped_heads
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

ALIASES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}


def configure_bloom(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_aliases(raw, ALIASES)
    if raw.flag("apply_residual_connection_post_layernorm", False):
        raise raw.wrong("apply_residual_connection_post_layernorm", "false")
    # The older key wins, as in transformers.
    hidden_size, num_heads = raw.size("n_embed" if "n_embed" in raw else "hidden_size"), raw.size("n_head")
    head_size = hidden_size // num_heads
    return DecoderConfig(
        architecture="BloomForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=raw.size("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        context_length=context_length(raw, limit, trained=raw.size("seq_length", 2048), most=UNBOUNDED),
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        positions="alibi",
        attention_scale=head_size**-0.5,
        query_key_value_bias=True,
        attention_output_bias=True,
        activation="gelu_tanh",
        gated=False,
        mlp_bias=True,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def weights(config: DecoderConfig) -> WeightMap:
    order = HeadOrder(head_size=config.head_size, heads=grouped_heads(config.num_heads, config.num_heads))
    return named_weights(
        config,
        Naming(
            prefix="transformer.",
            outer={
                "embedding": "word_embeddings",
                "embedding_norm": "word_embeddings_layernorm",
                "norm": "ln_f",
            },
            layers="h",
            inner={
                "attention_norm": ("input_layernorm",),
                "mlp_norm": ("post_attention_layernorm",),
                "attention.query_key_value": ("self_attention.query_key_value",),
                "attention.output": ("self_attention.dense",),
                "mlp.up": ("mlp.dense_h_to_4h",),
                "mlp.down": ("mlp.dense_4h_to_h",),
            },
            orders={"self_attention.query_key_value": order},
        ),
    )


ARCHITECTURES = {
    "BloomForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_bloom, weights=weights
    )
}
