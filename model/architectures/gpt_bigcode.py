"""StarCoder and SantaCoder (arXiv 2305.06161) onto `DecoderConfig`: GPT-2, whose heads may share one key and value.

Where they do not, the fused projection is stored head by head. Knows no tensors.
"""

from dataclasses import replace

from model.architectures.gpt2 import configure_gpt2
from model.architectures.llama import ACTIVATIONS, with_aliases
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
    config = configure_gpt2(raw, limit)
    return replace(
        config,
        architecture="GPTBigCodeForCausalLM",
        num_kv_heads=1 if raw.flag("multi_query", True) else config.num_heads,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_pytorch_tanh"),
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
