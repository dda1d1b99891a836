"""RemBERT (arXiv 2010.12821): BERT behind narrow embeddings and a projection, and before an output matrix of its own.

The head over the vocabulary, as wide as neither, is not read. Maps `config.json` and stored names onto `EncoderConfig`
and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import bert_head, bert_layer, configure_bert, embeddings
from model.architectures.encoders import UNUSED, Kind, biased, family
from model.architectures.llama import with_defaults
from model.architectures.mapping import WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderConfig

DEFAULTS = {
    "vocab_size": 250300,
    "hidden_size": 1152,
    "num_hidden_layers": 32,
    "num_attention_heads": 18,
    "intermediate_size": 4608,
}
"""What an absent key means, where it is not what it means for BERT."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    return replace(
        configure_bert(with_defaults(raw, DEFAULTS), limit, kind),
        embedding_size=raw.size("input_embedding_size", 256),
        embedding_projection="after_norm",
    )


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "rembert.embeddings") | bert_head(config, "rembert")
    parameters |= biased("embedding.projection", "rembert.encoder.embedding_hidden_mapping_in")
    for layer in range(config.num_layers):
        parameters |= bert_layer(f"layers.{layer}", f"rembert.encoder.layer.{layer}")
    return WeightMap(parameters=parameters, ignored=(*UNUSED, r"(rembert\.)?pooler\..*"), prefix="rembert.")


ARCHITECTURES = family("RemBert", configure, weights)
