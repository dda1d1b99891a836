"""MegatronBERT (arXiv 1909.08053): BERT with norms on the inputs of sublayers and at the end, not on the embeddings.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace

from model.architectures.bert import bert_head, bert_layer, configure_bert, embeddings
from model.architectures.encoders import UNUSED, Kind, biased, family, masked_lm, tied_head
from model.architectures.llama import with_defaults
from model.architectures.mapping import WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderConfig

DEFAULTS = {
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
"""What an absent key means, where it is not what it means for BERT."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    config = configure_bert(with_defaults(raw, DEFAULTS), limit, kind)
    return replace(config, pre_norm=True, embedding_norm=False)


def weights(config: EncoderConfig) -> WeightMap:
    parameters = embeddings(config, "bert.embeddings") | biased("norm", "bert.encoder.ln") | bert_head(config, "bert")
    for layer in range(config.num_layers):
        theirs = f"bert.encoder.layer.{layer}"
        parameters |= bert_layer(f"layers.{layer}", theirs, attention_norm="attention.ln", mlp_norm="ln")
    ignored = (*UNUSED, r"(bert\.)?pooler\..*")
    aliases = tied_head(config, parameters, bias="cls.predictions.bias")
    return WeightMap(parameters=parameters, ignored=ignored, prefix="bert.", aliases=aliases)


ARCHITECTURES = family("MegatronBert", configure, weights)
MASKED_LMS = masked_lm("MegatronBert", configure, weights)
