"""Blenderbot (arXiv 2004.13637) and its small version: BART whose table of positions begins with position 0.

The large one has mBART's norms; the small one norms the target's embeddings before positions are added. Maps
`config.json` onto `EncoderDecoderConfig`; tensor names are BART's. Knows no tensors.
"""

from dataclasses import replace

from model.architectures import bart
from model.architectures.llama import with_defaults
from model.architectures.mapping import Architecture
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig

DEFAULTS = {
    "d_model": 2560,
    "encoder_layers": 2,
    "decoder_layers": 24,
    "encoder_attention_heads": 32,
    "decoder_attention_heads": 32,
    "encoder_ffn_dim": 10240,
    "decoder_ffn_dim": 10240,
    "max_position_embeddings": 128,
}
SMALL_DEFAULTS = {
    "d_model": 512,
    "encoder_layers": 8,
    "decoder_layers": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "max_position_embeddings": 512,
}
"""What an absent key means, where it is not what it means for BART."""


def configure(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    return replace(
        bart.configure(with_defaults(raw, DEFAULTS), limit),
        architecture="BlenderbotForConditionalGeneration",
        norm_first=True,
        embedding_norm=False,
        final_norm=True,
        position_offset=0,
    )


def configure_small(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    return replace(
        bart.configure(with_defaults(raw, SMALL_DEFAULTS), limit),
        architecture="BlenderbotSmallForConditionalGeneration",
        position_offset=0,
        target_norm_before_positions=True,
    )


ARCHITECTURES = {
    "BlenderbotForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=bart.weights
    ),
    "BlenderbotSmallForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure_small, weights=bart.weights
    ),
}
