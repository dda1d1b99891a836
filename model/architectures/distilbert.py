"""DistilBERT: BERT without token types, under names of its own.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from model.architectures.bert import embeddings
from model.architectures.encoders import (
    UNUSED,
    Kind,
    biased,
    family,
    fused,
    head_size,
    masked_lm,
    num_labels,
    plain_head,
    tied_head,
    vocabulary_head,
    vocabulary_head_parts,
)
from model.architectures.llama import ACTIVATIONS, context_length
from model.architectures.mapping import WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderConfig, HeadConfig

NORM_EPSILON = 1e-12
"""The reference code has it as a constant."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    hidden_size, num_heads = raw.size("dim", 768), raw.size("n_heads", 12)
    num_positions = raw.size("max_position_embeddings", 512)
    head = None if kind is None else plain_head(raw, kind)
    if kind == "sequence":
        head = HeadConfig(kind="sequence", num_outputs=num_labels(raw), dense=True, activation="relu")
    activation = raw.choice("activation", ACTIVATIONS, "gelu")
    if kind == "vocabulary":
        head = vocabulary_head(raw, activation=activation, epsilon=NORM_EPSILON)
    return EncoderConfig(
        architecture="DistilBertModel",
        vocab_size=raw.size("vocab_size", 30522),
        hidden_size=hidden_size,
        intermediate_size=raw.size("hidden_dim", 3072),
        num_layers=raw.size("n_layers", 6),
        num_heads=num_heads,
        context_length=context_length(raw, limit, trained=num_positions),
        num_positions=num_positions,
        embedding_size=hidden_size,
        attention_scale=head_size(raw, hidden_size, num_heads) ** -0.5,
        norm_epsilon=NORM_EPSILON,
        activation=activation,
        head=head,
    )


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "distilbert.embeddings")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"distilbert.transformer.layer.{layer}"
        parameters |= fused(f"{ours}.query_key_value", *(f"{theirs}.attention.{x}_lin" for x in "qkv"))
        parameters |= biased(f"{ours}.output", f"{theirs}.attention.out_lin")
        parameters |= biased(f"{ours}.attention_norm", f"{theirs}.sa_layer_norm")
        parameters |= biased(f"{ours}.mlp.up", f"{theirs}.ffn.lin1")
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.ffn.lin2")
        parameters |= biased(f"{ours}.mlp_norm", f"{theirs}.output_layer_norm")
    if config.head is not None and config.head.kind == "vocabulary":
        parameters |= vocabulary_head_parts("vocab_transform", "vocab_layer_norm", "vocab_projector")
    elif config.head is not None:
        if config.head.dense:
            parameters |= biased("head.dense", "pre_classifier")
        parameters |= biased("head.output", "qa_outputs" if config.head.kind == "span" else "classifier")
    ignored = (*UNUSED, r"vocab_.*")
    return WeightMap(
        parameters=parameters, ignored=ignored, prefix="distilbert.", aliases=tied_head(config, parameters)
    )


ARCHITECTURES = family("DistilBert", configure, weights)
MASKED_LMS = masked_lm("DistilBert", configure, weights)
