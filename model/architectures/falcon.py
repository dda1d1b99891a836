"""Falcon (arXiv 2311.16867) onto `DecoderConfig`: 7B and 40B, the second 11B, and those of RefinedWeb with ALiBi.

Attention and MLP side by side, behind one norm or two, and few key/value heads, which lie behind the queries that share
them. Knows no tensors.
"""

from model.architectures.llama import ACTIVATIONS, UNBOUNDED, context_length, most_positions, with_aliases
from model.architectures.mapping import Architecture, HeadOrder, WeightMap, grouped_heads
from model.architectures.named import Naming, named_weights
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import DecoderConfig

REFINED_WEB_ALIASES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}


def configure_falcon(raw: RawConfig, limit: int | None) -> DecoderConfig:
    if raw.flag("apply_residual_connection_post_layernorm", False):
        raise raw.wrong("apply_residual_connection_post_layernorm", "false")
    hidden_size = raw.size("n_embed", raw.size("hidden_size", 4544))
    num_heads = raw.size("num_attention_heads", 71)
    head_size, alibi = hidden_size // num_heads, raw.flag("alibi", False)
    trained = raw.size("max_position_embeddings", 2048)
    length = context_length(raw, limit, trained=trained, most=UNBOUNDED if alibi else most_positions(raw, trained))
    bias, (parallel, shared) = raw.flag("bias", False), _residual(raw)
    return DecoderConfig(
        architecture="FalconForCausalLM",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("ffn_hidden_size", 4 * hidden_size),
        num_layers=raw.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(raw, num_heads),
        head_size=head_size,
        context_length=length,
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        parallel_residual=parallel,
        shared_norm=shared,
        positions="alibi" if alibi else "rotary",
        # Its bias is scaled together with the scores.
        alibi_scale=head_size**-0.5 if alibi else 1.0,
        rotary=None if alibi else rotary(raw, head_size, length=length),
        attention_scale=head_size**-0.5,
        query_key_value_bias=bias,
        attention_output_bias=bias,
        activation=raw.choice("activation", ACTIVATIONS, "gelu"),
        gated=False,
        mlp_bias=bias,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def configure_refined_web(raw: RawConfig, limit: int | None) -> DecoderConfig:
    """As Falcon's first files, and what was made of them, name class and sizes: the 40B alone counts its key heads."""
    raw = with_aliases(raw, REFINED_WEB_ALIASES)
    flags = {key: raw.flag(key, False) for key in ("multi_query", "parallel_attn")}
    flags["new_decoder_architecture"] = "num_kv_heads" in raw and not flags["multi_query"]
    return configure_falcon(RawConfig({**raw.values, **flags}, raw.file), limit)


def _num_kv_heads(raw: RawConfig, num_heads: int) -> int:
    if raw.flag("new_decoder_architecture", False):
        found = raw.size("num_kv_heads", num_heads)
        if num_heads % found:
            raise raw.wrong("num_kv_heads", f"a divisor of the {num_heads} attention heads")
        return found
    return 1 if raw.flag("multi_query", True) else num_heads


def _residual(raw: RawConfig) -> tuple[bool, bool]:
    """Whether attention and MLP are side by side, and whether they share a norm."""
    new, parallel = raw.flag("new_decoder_architecture", False), raw.flag("parallel_attn", True)
    if new and not parallel:
        raise raw.wrong("parallel_attn", "true, with new_decoder_architecture")
    num_norms = raw.whole("num_ln_in_parallel_attn", 2 if new else 1)
    if num_norms not in ((1, 2) if new else (1,)):
        raise raw.wrong("num_ln_in_parallel_attn", "1, or with new_decoder_architecture 2")
    return parallel, parallel and num_norms == 1


def weights(config: DecoderConfig) -> WeightMap:
    norms = ("ln_attn", "ln_mlp") if config.parallel_residual else ("input_layernorm", "post_attention_layernorm")
    if config.shared_norm:
        norms = ("input_layernorm", "")
    order = HeadOrder(head_size=config.head_size, heads=grouped_heads(config.num_heads, config.num_kv_heads))
    inner = {
        "attention_norm": norms[:1],
        "mlp_norm": norms[1:],
        "attention.query_key_value": ("self_attention.query_key_value",),
        "attention.output": ("self_attention.dense",),
        "mlp.up": ("mlp.dense_h_to_4h",),
        "mlp.down": ("mlp.dense_4h_to_h",),
    }
    return named_weights(
        config,
        Naming(
            prefix="transformer.",
            outer={"embedding": "word_embeddings", "norm": "ln_f"},
            layers="h",
            inner={ours: theirs for ours, theirs in inner.items() if theirs != ("",)},
            orders={"self_attention.query_key_value": order},
            ignored=(r".*\.rotary(_emb)?\.inv_freq",),
        ),
    )


ARCHITECTURES = {
    "FalconForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_falcon, weights=weights
    ),
    "RWForCausalLM": Architecture(
        network="decoder", head="language_model", configure=configure_refined_web, weights=weights
    ),
}
