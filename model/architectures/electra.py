"""ELECTRA (arXiv 2003.10555): BERT with a projection behind narrow embeddings, and RoFormer (arXiv 2104.09864).

RoFormer is the same with rotary positions; it was the first to have them. The heads over the vocabulary, as narrow as
the embeddings, are not read. Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters;
knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from model.architectures.bert import bert_layer, configure_bert, embeddings, roberta_head
from model.architectures.encoders import UNUSED, Kind, biased, family, num_labels, only
from model.architectures.llama import with_defaults
from model.architectures.mapping import HeadOrder, Part, WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderConfig, HeadConfig, Rotary

ELECTRA_DEFAULTS = {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
ROFORMER_DEFAULTS = {"vocab_size": 50000, "max_position_embeddings": 1536}
"""What an absent key means, where it is not what it means for BERT."""


def configure(
    raw: RawConfig, limit: int | None, kind: Kind | None, *, defaults: Mapping[str, Any] = ELECTRA_DEFAULTS
) -> EncoderConfig:
    raw = with_defaults(raw, defaults)
    config = configure_bert(raw, limit, kind)
    width = raw.size("embedding_size", config.hidden_size)
    head = config.head
    if kind == "sequence":
        head = HeadConfig(kind="sequence", num_outputs=num_labels(raw), dense=True, activation="gelu")
    return replace(
        config,
        embedding_size=width,
        embedding_projection="after_norm" if width != config.hidden_size else None,
        head=head,
    )


def configure_roformer(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    only(raw, {"rotary_value": False})
    config = configure(raw, limit, kind, defaults=ROFORMER_DEFAULTS)
    head = config.head
    return replace(
        config,
        learned_positions=False,
        num_positions=0,
        rotary=Rotary(theta=10000.0, size=config.head_size),
        head=replace(head, activation=config.activation) if head is not None and head.dense else head,
    )


def weights(config: EncoderConfig, *, base: str) -> WeightMap:
    parameters = embeddings(config, f"{base}.embeddings") | roberta_head(config)
    if config.embedding_projection is not None:
        parameters |= biased("embedding.projection", f"{base}.embeddings_project")
    for layer in range(config.num_layers):
        parameters |= bert_layer(f"layers.{layer}", f"{base}.encoder.layer.{layer}")
    ignored = (*UNUSED, r"(generator|discriminator)_.*", r".*\.embed_positions\.weight")
    return WeightMap(parameters=parameters, ignored=ignored, prefix=f"{base}.")


def roformer_weights(config: EncoderConfig) -> WeightMap:
    """The two numbers that turn together lie side by side in a head."""
    found = weights(config, base="roformer")
    order = HeadOrder(head_size=config.head_size, paired=config.head_size)

    def turned(source: Part) -> Part:
        turns = source.name.endswith((".query.weight", ".query.bias", ".key.weight", ".key.bias"))
        return replace(source, order=order) if turns else source

    return replace(found, parameters={name: tuple(map(turned, sources)) for name, sources in found.parameters.items()})


ARCHITECTURES = {
    **family("Electra", configure, partial(weights, base="electra")),
    **family("RoFormer", configure_roformer, roformer_weights),
}
