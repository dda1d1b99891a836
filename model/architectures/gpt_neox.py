"""GPT-NeoX (arXiv 2204.06745) and Pythia onto `DecoderConfig`: parallel residual, rotary positions on part of a head.

The fused projection is stored head by head and is regrouped. Knows no tensors.
"""

from dataclasses import replace

from model.architectures.llama import ACTIVATIONS, context_length, most_positions
from model.architectures.mapping import Architecture, HeadOrder, WeightMap, grouped_heads
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import DecoderConfig


def configure_gpt_neox(raw: RawConfig, limit: int | None) -> DecoderConfig:
    hidden_size, num_heads = raw.size("hidden_size"), raw.size("num_attention_heads")
    head_size = hidden_size // num_heads
    trained = raw.size("max_position_embeddings", 2048)
    length = context_length(raw, limit, trained=trained, most=most_positions(raw, trained))
    theta, partial = raw.number("rotary_emb_base", 10000.0), raw.number("rotary_pct", 0.25)
    bias = raw.flag("attention_bias", True)
    return DecoderConfig(
        architecture="GPTNeoXForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("intermediate_size"),
        num_layers=raw.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        context_length=length,
        norm="layer",
        norm_epsilon=raw.number("layer_norm_eps", 1e-5),
        parallel_residual=raw.flag("use_parallel_residual", True),
        rotary=rotary(raw, head_size, length=length, theta=theta, partial=partial),
        attention_scale=head_size**-0.5,
        query_key_value_bias=bias,
        attention_output_bias=bias,
        activation=raw.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        mlp_bias=True,
        tied_embeddings=raw.flag("tie_word_embeddings", False),
    )


def weights(config: DecoderConfig) -> WeightMap:
    order = HeadOrder(head_size=config.head_size, heads=grouped_heads(config.num_heads, config.num_heads))
    naming = Naming(
        prefix="gpt_neox.",
        outer={"embedding": "embed_in", "norm": "final_layer_norm"},
        layers="layers",
        inner={
            "attention_norm": ("input_layernorm",),
            "mlp_norm": ("post_attention_layernorm",),
            "attention.query_key_value": ("attention.query_key_value",),
            "attention.output": ("attention.dense",),
            "mlp.up": ("mlp.dense_h_to_4h",),
            "mlp.down": ("mlp.dense_4h_to_h",),
        },
        orders={"attention.query_key_value": order},
        ignored=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
    )
    # The head's name before transformers 5.
    return replace(named_weights(config, naming), renamed=(("embed_out.", "lm_head."),))


ARCHITECTURES = {
    "GPTNeoXForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_gpt_neox, weights=weights
    )
}
