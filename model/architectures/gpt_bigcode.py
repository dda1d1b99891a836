"""StarCoder and SantaCoder (arXiv 2305.06161) onto `DecoderConfig`: GPT-2, whose heads may share one key and value.

Where they do not, the fused projection is stored head by head. Knows no tensors.
"""

from model.architectures.llama import ACTIVATIONS, context_length, with_aliases
from model.architectures.mapping import Architecture, HeadOrder, WeightMap, grouped_heads
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def configure_gpt_bigcode(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_aliases(raw, ALIASES)
    if raw.flag("add_cross_attention", False):
        raise raw.wrong("add_cross_attention", "false")
    hidden_size, num_heads = raw.size("n_embd"), raw.size("n_head")
    head_size, num_positions = hidden_size // num_heads, raw.size("n_positions", 1024)
    return DecoderConfig(
        architecture="GPTBigCodeForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("n_inner", 4 * hidden_size),
        num_layers=raw.size("n_layer"),
        num_heads=num_heads,
        num_kv_heads=1 if raw.flag("multi_query", True) else num_heads,
        head_size=head_size,
        context_length=context_length(raw, limit, trained=num_positions),
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        num_learned_positions=num_positions,
        attention_scale=head_size**-0.5 if raw.flag("scale_attn_weights", True) else 1.0,
        query_key_value_bias=True,
        attention_output_bias=True,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=False,
        mlp_bias=True,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def weights(config: DecoderConfig) -> WeightMap:
    order = HeadOrder(head_size=config.head_size, heads=grouped_heads(config.num_heads, config.num_kv_heads))
    return named_weights(
        config,
        Naming(
            prefix="transformer.",
            outer={"embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"},
            layers="h",
            inner={
                "attention_norm": ("ln_1",),
                "mlp_norm": ("ln_2",),
                "attention.query_key_value": ("attn.c_attn",),
                "attention.output": ("attn.c_proj",),
                "mlp.up": ("mlp.c_fc",),
                "mlp.down": ("mlp.c_proj",),
            },
            orders={"attn.c_attn": order},
            ignored=(r".*\.attn\.(masked_)?bias",),
        ),
    )


ARCHITECTURES = {
    "GPTBigCodeForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_gpt_bigcode, weights=weights
    )
}
