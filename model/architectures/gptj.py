"""GPT-J and CodeGen (arXiv 2203.13474) onto `DecoderConfig`: attention and MLP side by side behind one norm, and rotary
positions in pairs of neighbours on part of a head.

CodeGen's fused projection lies in four parts, each with its queries, values and keys. Knows no tensors.
"""

from dataclasses import replace

from model.architectures.llama import ACTIVATIONS, context_length, with_aliases
from model.architectures.mapping import Architecture, HeadOrder, WeightMap
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.config import DecoderConfig, Rotary

ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
NUM_PARTS = 4
"""Devices that CodeGen was trained on at once."""


def configure_gptj(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_aliases(raw, ALIASES)
    hidden_size, num_heads = raw.size("n_embd"), raw.size("n_head")
    head_size, rotated = hidden_size // num_heads, raw.size("rotary_dim", 64)
    if rotated % 2 or rotated > head_size:
        raise raw.wrong("rotary_dim", f"an even number of at most {head_size}, the width of a head")
    return DecoderConfig(
        architecture="GPTJForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("n_inner", 4 * hidden_size),
        num_layers=raw.size("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        context_length=context_length(raw, limit, trained=raw.size("n_positions", 2048)),
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        parallel_residual=True,
        shared_norm=True,
        rotary=Rotary(theta=10000.0, size=rotated),
        attention_scale=head_size**-0.5,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        mlp_bias=True,
        logits_bias=True,
        tied_embeddings=raw.flag("tie_word_embeddings", False),
    )


def configure_codegen(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_gptj(raw, limit)
    if config.num_heads % NUM_PARTS:
        raise with_aliases(raw, ALIASES).wrong("n_head", f"a multiple of {NUM_PARTS}")
    return replace(config, architecture="CodeGenForCausalLM")


def weights_gptj(config: DecoderConfig) -> WeightMap:
    paired = HeadOrder(head_size=config.head_size, paired=_rotated(config))
    stored = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    return named_weights(config, _naming(stored, dict.fromkeys(stored[:2], paired)))


def weights_codegen(config: DecoderConfig) -> WeightMap:
    size = config.num_heads // NUM_PARTS
    queries, values, keys = (
        [(3 * part + which) * size + head for part in range(NUM_PARTS) for head in range(size)] for which in range(3)
    )
    order = HeadOrder(
        head_size=config.head_size,
        heads=(*queries, *keys, *values),
        paired=_rotated(config),
        num_paired_heads=2 * config.num_heads,
    )
    return named_weights(config, _naming(("attn.qkv_proj",), {"attn.qkv_proj": order}))


def _naming(fused: tuple[str, ...], orders: dict[str, HeadOrder]) -> Naming:
    return Naming(
        prefix="transformer.",
        outer={"embedding": "wte", "norm": "ln_f"},
        layers="h",
        inner={
            "attention_norm": ("ln_1",),
            "attention.query_key_value": fused,
            "attention.output": ("attn.out_proj",),
            "mlp.up": ("mlp.fc_in",),
            "mlp.down": ("mlp.fc_out",),
        },
        orders=orders,
        ignored=(r".*\.attn\.(bias|masked_bias|causal_mask|scale_attn|embed_positions)",),
    )


def _rotated(config: DecoderConfig) -> int:
    assert config.rotary is not None
    return config.rotary.size


ARCHITECTURES = {
    "GPTJForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_gptj, weights=weights_gptj
    ),
    "CodeGenForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_codegen, weights=weights_codegen
    ),
}
