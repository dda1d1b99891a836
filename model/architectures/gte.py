"""GTE (gte-multilingual, gte-en-v1.5, arXiv 2407.19669): BERT with rotary positions and gated MLPs.

Its authors' code calls it "new". Maps `config.json` and stored names (the authors', which transformers keeps in files)
onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

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
    vocabulary_head,
    vocabulary_head_parts,
    without,
)
from model.architectures.jina_embeddings_v3 import attention_and_norms
from model.architectures.llama import context_length, most_positions, with_defaults
from model.architectures.mapping import Part, WeightMap
from model.architectures.raw import RawConfig
from model.architectures.rope import rotary
from model.config import EncoderConfig, Rotary, RotaryScaling

DEFAULTS = {"vocab_size": 250048, "type_vocab_size": 1, "max_position_embeddings": 8192}
NEW_DEFAULTS = {"vocab_size": 30528, "type_vocab_size": 1, "max_position_embeddings": 2048, "rope_theta": 10000.0}
"""What an absent key means to transformers, and to the authors' code, where it is not what it means for BERT."""

COMPUTED = {
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
}
"""What the authors' code can do otherwise, and transformers' cannot."""


RENAMED = (
    ("new.", "gte."),
    ("encoder.layer.", "layers."),
    ("attention.o_proj.", "self_attn.o_proj."),
    ("attn_ln.", "post_attention_layernorm."),
    ("mlp_ln.", "post_mlp_layernorm."),
    ("lm_head.norm.", "lm_head.layer_norm."),
)
DIVIDED = (
    ("attention.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("mlp.up_gate_proj", ("mlp.up_proj", "mlp.gate_proj")),
)
"""The authors' names, which are in files, and transformers', by which adapters know modules."""


def configure(
    raw: RawConfig, limit: int | None, kind: Kind | None, *, defaults: Mapping[str, Any] = DEFAULTS
) -> EncoderConfig:
    only(raw, COMPUTED)
    raw = with_defaults(raw, defaults)
    config = configure_bert(RawConfig({**raw.values, "position_embedding_type": None}, raw.file), None, kind)
    trained = raw.size("max_position_embeddings")
    length = context_length(raw, limit, trained=trained, most=most_positions(raw, trained))
    if kind == "vocabulary":
        config = replace(config, head=vocabulary_head(raw, activation="gelu", epsilon=config.norm_epsilon))
    return replace(
        config,
        context_length=length,
        learned_positions=False,
        num_positions=0,
        rotary=_rotary(raw, config.head_size, length),
        gated=True,
        mlp_bias=False,
        mlp_down_bias=True,
    )


def _rotary(raw: RawConfig, size: int, length: int) -> Rotary:
    """The authors' "ntk": a base `factor` times as large, and all frequencies lower by factor^(2 / R).

    (kexue.fm/archives/9706, equation 6; its refinement with exponents of their own, `mixed_b`, is refused.)
    """
    section = raw.section("rope_scaling") if "rope_scaling" in raw else RawConfig({}, raw.file)
    if section.text("rope_type", section.text("type", "default")) != "ntk":
        return rotary(raw, size, length=length, theta=160_000.0)
    only(section, {"mixed_b": None})
    factor = max(1.0, section.number("factor"))
    scaling = RotaryScaling(kind="linear", factor=factor ** (2 / size))
    return Rotary(theta=raw.number("rope_theta", 160_000.0) * factor, size=size, scaling=scaling)


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "gte.embeddings")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"gte.layers.{layer}"
        parameters |= attention_and_norms(ours, theirs)
        parameters |= fused(f"{ours}.mlp.gate_up", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj", bias=False)
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj")
    ignored: tuple[str, ...] = UNUSED
    if config.head is None or config.head.kind != "sequence":
        ignored = (*ignored, r"(gte\.)?pooler\..*")
    parameters |= _head(config)
    aliases = tied_head(config, parameters)
    return WeightMap(
        parameters=parameters, ignored=ignored, prefix="gte.", renamed=RENAMED, divided=DIVIDED, aliases=aliases
    )


def _head(config: EncoderConfig) -> dict[str, tuple[Part, ...]]:
    if config.head is None:
        return {}
    if config.head.kind == "vocabulary":
        return vocabulary_head_parts("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
    dense = biased("head.dense", "gte.pooler.dense") if config.head.dense else {}
    return dense | biased("head.output", "qa_outputs" if config.head.kind == "span" else "classifier")


_configure_new = partial(configure, defaults=NEW_DEFAULTS)

ARCHITECTURES = {
    **family("Gte", configure, weights, classes=without("ForQuestionAnswering")),
    **family("New", _configure_new, weights),
}
MASKED_LMS = {**masked_lm("Gte", configure, weights), **masked_lm("New", _configure_new, weights)}
