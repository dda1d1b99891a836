"""ALBERT: BERT whose layers share their weights, with narrow embedding tables and a projection behind them.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import configure_bert, embeddings
from model.architectures.encoders import UNUSED, Kind, biased, family, fused
from model.architectures.llama import with_defaults
from model.architectures.mapping import WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderConfig

DEFAULTS = {
    "vocab_size": 30000,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
}
"""What a `config.json` that leaves these keys out means, where that is not BERT's."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    raw = with_defaults(raw, DEFAULTS)
    config = configure_bert(raw, limit, kind)
    groups, inner = raw.size("num_hidden_groups", 1), raw.size("inner_group_num", 1)
    per_group = config.num_layers / groups
    order = tuple(int(step / per_group) * inner + layer for step in range(config.num_layers) for layer in range(inner))
    return replace(
        config,
        num_layers=len(order),
        weight_order=order,
        weights_per_group=inner,
        embedding_size=raw.size("embedding_size", 128),
        embedding_projection="after_norm",
    )


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "albert.embeddings")
    parameters |= biased("embedding.projection", "albert.encoder.embedding_hidden_mapping_in")
    inner = config.weights_per_group
    for index in range(config.num_weight_sets):
        ours = f"layers.{index}"
        theirs = f"albert.encoder.albert_layer_groups.{index // inner}.albert_layers.{index % inner}"
        parameters |= fused(f"{ours}.query_key_value", *(f"{theirs}.attention.{x}" for x in ("query", "key", "value")))
        parameters |= biased(f"{ours}.output", f"{theirs}.attention.dense")
        parameters |= biased(f"{ours}.attention_norm", f"{theirs}.attention.LayerNorm")
        parameters |= biased(f"{ours}.mlp.up", f"{theirs}.ffn")
        parameters |= biased(f"{ours}.mlp.down", f"{theirs}.ffn_output")
        parameters |= biased(f"{ours}.mlp_norm", f"{theirs}.full_layer_layer_norm")
    ignored: tuple[str, ...] = (*UNUSED, r"predictions\..*", r"sop_classifier\..*")
    if config.head is not None and config.head.kind == "sequence":
        parameters |= biased("head.dense", "albert.pooler") | biased("head.output", "classifier")
    else:
        ignored = (*ignored, r"(albert\.)?pooler\..*")
        if config.head is not None:
            parameters |= biased("head.output", "qa_outputs" if config.head.kind == "span" else "classifier")
    return WeightMap(parameters=parameters, ignored=ignored, prefix="albert.")


ARCHITECTURES = family("Albert", configure, weights)
