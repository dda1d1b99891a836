"""NomicBERT (nomic-embed-text, arXiv 2402.01613): BERT with rotary positions, gated MLPs and no biases.

Maps `config.json`, with GPT-2's keys as its authors wrote it or with BERT's as transformers does, and stored names (the
authors', which transformers keeps in files) onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import configure_bert, embeddings
from model.architectures.encoders import (
    UNUSED,
    Kind,
    biased,
    family,
    fused,
    masked_lm,
    only,
    tied_head,
    vocabulary_head_parts,
    without,
)
from model.architectures.jina_embeddings_v3 import attention_and_norms
from model.architectures.llama import UNBOUNDED, context_length, with_defaults
from model.architectures.mapping import Part, WeightMap
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import EncoderConfig

DEFAULTS = {"vocab_size": 30528, "hidden_act": "silu", "max_position_embeddings": 2048}
"""What an absent key means, where it is not what it means for BERT."""

OLD_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "max_trained_positions": "max_position_embeddings",
}
"""The authors' names of what transformers calls otherwise; where a config has both, they mean the same."""

COMPUTED = {
    "activation_function": "swiglu",
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "prenorm": False,
    "causal": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "moe_every_n_layers": 0,
    "num_experts": 0,
}
"""What the authors' code can do otherwise (nomic-embed-text-v2-moe: experts), and transformers' cannot."""


RENAMED = (
    ("nomic_bert.", "bert."),
    ("emb_ln.", "embeddings.LayerNorm."),
    ("encoder.layers.", "layers."),
    ("attn.out_proj.", "self_attn.o_proj."),
    ("norm1.", "post_attention_layernorm."),
    ("norm2.", "post_mlp_layernorm."),
    ("fc11.", "up_proj."),
    ("fc12.", "gate_proj."),
    ("fc2.", "down_proj."),
)
DIVIDED = (("attn.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),)
"""The authors' names, which are in files, and transformers', by which adapters know modules."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    only(raw, COMPUTED)
    raw = with_defaults(_with_new_keys(raw), DEFAULTS)
    config = configure_bert(raw, None, kind)
    only(raw, {"head_dim": config.head_size})
    trained = raw.size("max_position_embeddings")
    longest = raw.size("n_positions", trained)
    section = raw.section("rope_parameters")
    scaled = section.text("rope_type", "default") == "dynamic"
    length = context_length(
        raw, limit, trained=max(trained, longest) if scaled else trained, most=UNBOUNDED if scaled else longest
    )
    return replace(
        config,
        context_length=length,
        learned_positions=False,
        num_positions=0,
        attention_bias=False,
        rotary=rotary(raw, config.head_size, length=length, theta=1000.0),
        gated=True,
        mlp_bias=False,
    )


def _with_new_keys(raw: RawConfig) -> RawConfig:
    """`rotary_scaling_factor`: by how much the authors' code stretches texts longer than those it was trained on."""
    new = {OLD_KEYS[key]: value for key, value in raw.values.items() if key in OLD_KEYS}
    old_rope = (
        {"rope_type": "dynamic", "factor": raw.number("rotary_scaling_factor")}
        if "rotary_scaling_factor" in raw
        else {}
    )
    rope = next((raw.section(key).values for key in ("rope_parameters", "rope_scaling") if key in raw), {})
    return RawConfig({**new, **raw.values, "rope_parameters": {**old_rope, **rope}}, raw.file)


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "bert.embeddings")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"bert.layers.{layer}"
        parameters |= attention_and_norms(ours, theirs, bias=False)
        parameters |= fused(f"{ours}.mlp.gate_up", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj", bias=False)
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", bias=False)
    ignored: tuple[str, ...] = UNUSED
    if config.head is None or config.head.kind != "sequence":
        ignored = (*ignored, r"(bert\.)?pooler\..*")
    parameters |= _head(config)
    aliases = tied_head(config, parameters, bias="cls.predictions.bias")
    return WeightMap(
        parameters=parameters, ignored=ignored, prefix="bert.", renamed=RENAMED, divided=DIVIDED, aliases=aliases
    )


def _head(config: EncoderConfig) -> dict[str, tuple[Part, ...]]:
    if config.head is None:
        return {}
    if config.head.kind == "vocabulary":
        theirs = "cls.predictions"
        return vocabulary_head_parts(f"{theirs}.transform.dense", f"{theirs}.transform.layer_norm", f"{theirs}.decoder")
    if config.head.kind == "sequence":
        return biased("head.dense", "bert.pooler.dense") | biased("head.output", "classifier")
    return biased("head.output", "classifier")


ARCHITECTURES = family("NomicBert", configure, weights, classes=without("ForQuestionAnswering"))
MASKED_LMS = masked_lm("NomicBert", configure, weights)
