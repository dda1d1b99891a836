"""Marian (the OPUS-MT translators): BART without the norm of the embeddings, with sinusoidal positions.

Source and target may have vocabularies and embeddings of their own. Maps `config.json` onto `EncoderDecoderConfig`;
tensor names are BART's. Knows no tensors.
"""

from dataclasses import replace

from model.architectures import bart
from model.architectures.llama import UNBOUNDED
from model.architectures.mapping import Architecture, WeightMap
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig


def configure(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    config = bart.configure(raw, limit, most=UNBOUNDED)
    source_vocab_size = config.vocab_size
    return replace(
        config,
        architecture="MarianMTModel",
        vocab_size=raw.size("decoder_vocab_size", source_vocab_size),
        source_vocab_size=None if raw.flag("share_encoder_decoder_embeddings", True) else source_vocab_size,
        embedding_norm=False,
        positions="sinusoidal",
        position_offset=0,
    )


def weights(config: EncoderDecoderConfig) -> WeightMap:
    shared = bart.weights(config)
    if config.source_vocab_size is None:
        return shared
    return replace(shared, aliases=(("model.decoder.embed_tokens.weight", "lm_head.weight"),))


ARCHITECTURES = {
    "MarianMTModel": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=weights
    ),
}
