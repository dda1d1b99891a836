"""GPT-2 and Cerebras-GPT (arXiv 2304.03208), and BTLM (arXiv 2309.11568), which grew out of them, onto `DecoderConfig`.

Projections are stored [in, out] and the query, key and value projections fused. BTLM has ALiBi positions, a gated MLP
and the scales of muP (arXiv 2203.03466). Knows no tensors.
"""

from dataclasses import replace

from model.architectures.llama import ACTIVATIONS, context_length, tied
from model.architectures.mapping import Architecture, Part, WeightMap, part
from model.architectures.raw import RawConfig
from model.config import DecoderConfig


def configure_gpt2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if raw.flag(key, False):
            raise raw.wrong(key, "false")
    hidden_size, num_heads, num_positions = raw.size("n_embd"), raw.size("n_head"), raw.size("n_positions", 1024)
    head_size = hidden_size // num_heads
    return DecoderConfig(
        architecture="GPT2LMHeadModel",
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("n_inner", 4 * hidden_size),
        num_layers=raw.size("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        context_length=context_length(raw, limit, trained=num_positions),
        norm="layer",
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        num_learned_positions=num_positions,
        attention_scale=head_size**-0.5 if raw.flag("scale_attn_weights", True) else 1.0,
        query_key_value_bias=True,
        attention_output_bias=True,
        activation=raw.choice("activation_function", {**ACTIVATIONS, "swiglu": "silu"}, "gelu_new"),
        gated=raw.text("activation_function", "gelu_new") == "swiglu",
        mlp_bias=True,
        tied_embeddings=raw.flag("tie_word_embeddings", True),
    )


def configure_btlm(raw: RawConfig, limit: int | None) -> DecoderConfig:
    config = configure_gpt2(raw, limit)
    if raw.text("position_embedding_type", "learned") == "alibi":
        config = replace(
            config, positions="alibi", num_learned_positions=0, alibi_scale=_alibi_scale(raw, config.context_length)
        )
    if raw.flag("mup_scale_qk_dot_by_d", False) and raw.flag("scale_attn_weights", True):
        config = replace(config, attention_scale=1.0 / config.head_size)
    return replace(
        config,
        architecture="BTLMLMHeadModel",
        embedding_scale=raw.number("mup_embeddings_scale", 1.0),
        logit_scale=raw.number("mup_output_alpha", 1.0) * raw.number("mup_width_scale", 1.0),
    )


def _alibi_scale(raw: RawConfig, length: int) -> float:
    """Slopes shrink as the text outgrows the trained length (arXiv 2310.13017).

    Where the config says to follow each text's own length, the longest one that is allowed stands for all of them: a
    stream must not change its past as it grows.
    """
    if "alibi_scaling" not in raw:
        return 1.0
    section = raw.section("alibi_scaling")
    if "factor" in section:
        return 1.0 / section.number("factor")
    return min(1.0, section.size("train_seq_len") / length)


def weights(config: DecoderConfig) -> WeightMap:
    parameters = {"embedding.weight": part("transformer.wte.weight")} | _norm("norm", "transformer.ln_f")
    if config.num_learned_positions:
        parameters["position_embedding.weight"] = part("transformer.wpe.weight")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        parameters |= _norm(f"{ours}.attention_norm", f"{theirs}.ln_1") | _norm(f"{ours}.mlp_norm", f"{theirs}.ln_2")
        parameters |= _linear(f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn")
        parameters |= _linear(f"{ours}.attention.output", f"{theirs}.attn.c_proj")
        parameters |= _linear(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj")
        if config.gated:
            # c_fc2 is what goes through the activation.
            parameters |= _linear(f"{ours}.mlp.gate_up", f"{theirs}.mlp.c_fc2", f"{theirs}.mlp.c_fc")
        else:
            parameters |= _linear(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc")
    parameters["output.weight"] = part("lm_head.weight")
    masks = (r"(.*\.)?attn\.(masked_)?bias", r"(transformer\.)?relative_pe\.slopes")
    return WeightMap(
        parameters=parameters, aliases=tied(config, "transformer.wte.weight"), ignored=masks, prefix="transformer."
    )


def _norm(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    return {f"{ours}.{kind}": part(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def _linear(ours: str, *theirs: str) -> dict[str, tuple[Part, ...]]:
    return {
        f"{ours}.weight": tuple(Part(name=f"{name}.weight", transposed=True) for name in theirs),
        f"{ours}.bias": tuple(Part(name=f"{name}.bias") for name in theirs),
    }


GPT2 = Architecture(network="decoder", head="language_model", configure=configure_gpt2, weights=weights)
BTLM = Architecture(network="decoder", head="language_model", configure=configure_btlm, weights=weights)

# Cerebras-GPT's configs name the bare network, although the head (tied to the embedding) is meant.
ARCHITECTURES = {"GPT2LMHeadModel": GPT2, "GPT2Model": GPT2, "BTLMLMHeadModel": BTLM}
