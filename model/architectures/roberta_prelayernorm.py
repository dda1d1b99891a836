"""RoBERTa-PreLayerNorm and XLM-RoBERTa-XL (arXiv 2105.00572): RoBERTa with norms on the inputs of sublayers.

Maps `config.json` and stored names onto `EncoderConfig` and `model.encoder`'s parameters; knows no tensors.
"""

from dataclasses import replace
from functools import partial

from model.architectures.bert import bert_layer, configure_roberta, embeddings, roberta_head
from model.architectures.encoders import UNUSED, Kind, biased, family, masked_lm, tied_head
from model.architectures.llama import with_defaults
from model.architectures.mapping import WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderConfig

DEFAULTS = {"vocab_size": 50265}
XL_DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
"""What an absent key means, where it is not what it means for RoBERTa."""


def configure(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    return replace(configure_roberta(with_defaults(raw, DEFAULTS), limit, kind), pre_norm=True)


def configure_xl(raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig:
    config = configure_roberta(with_defaults(raw, XL_DEFAULTS), limit, kind)
    return replace(config, pre_norm=True, embedding_norm=False)


def weights(config: EncoderConfig, *, base: str, norm: str, attention_norm: str, mlp_norm: str) -> WeightMap:
    """Names as both store them, but for those of the norms."""
    parameters = embeddings(config, f"{base}.embeddings") | biased("norm", f"{base}.{norm}") | roberta_head(config)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{base}.encoder.layer.{layer}"
        parameters |= bert_layer(ours, theirs, attention_norm=attention_norm, mlp_norm=mlp_norm)
    ignored = (*UNUSED, rf"({base}\.)?pooler\..*")
    aliases = tied_head(config, parameters, bias="lm_head.bias")
    return WeightMap(parameters=parameters, ignored=ignored, prefix=f"{base}.", aliases=aliases)


_weights = partial(
    weights,
    base="roberta_prelayernorm",
    norm="LayerNorm",
    attention_norm="attention.LayerNorm",
    mlp_norm="intermediate.LayerNorm",
)
_weights_xl = partial(
    weights,
    base="roberta",
    norm="encoder.LayerNorm",
    attention_norm="attention.self_attn_layer_norm",
    mlp_norm="LayerNorm",
)

ARCHITECTURES = {
    **family("RobertaPreLayerNorm", configure, _weights),
    **family("XLMRobertaXL", configure_xl, _weights_xl),
}
MASKED_LMS = {
    **masked_lm("RobertaPreLayerNorm", configure, _weights),
    **masked_lm("XLMRobertaXL", configure_xl, _weights_xl),
}
