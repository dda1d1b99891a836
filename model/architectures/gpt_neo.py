"""GPT-Neo (and TinyStories' models) onto `DecoderConfig`: learned positions, unscaled scores, a window on some layers.

Knows no tensors.
"""

from typing import Any

from model.architectures.llama import ACTIVATIONS, context_length, with_aliases
from model.architectures.mapping import Architecture, WeightMap
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

ALIASES = {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}
USUAL_TYPES = [[["global", "local"], 12]]


def configure_gpt_neo(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_aliases(raw, ALIASES)
    hidden_size, num_heads = raw.size("hidden_size"), raw.size("num_heads")
    num_positions = raw.size("max_position_embeddings", 2048)
    window = raw.size("window_size", 256)
    return DecoderConfig(
        architecture="GPTNeoForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("intermediate_size", 4 * hidden_size),
        num_layers=raw.size("num_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        context_length=context_length(raw, limit, trained=num_positions),
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        num_learned_positions=num_positions,
        windows=tuple(window if kind == "local" else None for kind in _layer_types(raw)),
        attention_scale=1.0,
        attention_output_bias=True,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        mlp_bias=True,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def _layer_types(raw: RawConfig) -> list[str]:
    """`attention_types` written out: [[["global", "local"], 2]] is global, local, global, local."""
    num_layers = raw.size("num_layers")
    found: Any = raw.values.get("attention_types") or USUAL_TYPES
    try:
        kinds = [kind for names, count in found for _ in range(count) for kind in names]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != num_layers or not set(kinds) <= {"global", "local"}:
        raise raw.wrong("attention_types", f"global or local for each of {num_layers} layers")
    return kinds


def weights(config: DecoderConfig) -> WeightMap:
    return named_weights(
        config,
        Naming(
            prefix="transformer.",
            outer={"embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"},
            layers="h",
            inner={
                "attention_norm": ("ln_1",),
                "mlp_norm": ("ln_2",),
                "attention.query_key_value": (
                    "attn.attention.q_proj",
                    "attn.attention.k_proj",
                    "attn.attention.v_proj",
                ),
                "attention.output": ("attn.attention.out_proj",),
                "mlp.up": ("mlp.c_fc",),
                "mlp.down": ("mlp.c_proj",),
            },
            ignored=(r".*\.attn\.attention\.(masked_)?bias",),
        ),
    )


ARCHITECTURES = {
    "GPTNeoForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_gpt_neo, weights=weights
    )
}
