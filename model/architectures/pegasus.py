"""Pegasus: mBART without the norm of the embeddings, with sinusoidal positions (arXiv 1912.08777).

Maps `config.json` onto `EncoderDecoderConfig`; tensor names are BART's. Knows no tensors.
"""

from dataclasses import replace

from model.architectures import bart
from model.architectures.llama import UNBOUNDED
from model.architectures.mapping import Architecture
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig


def configure(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    return replace(
        bart.configure(raw, limit, most=UNBOUNDED),
        architecture="PegasusForConditionalGeneration",
        norm_first=True,
        embedding_norm=False,
        final_norm=True,
        positions="sinusoidal",
        position_offset=0,
    )


ARCHITECTURES = {
    "PegasusForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=bart.weights
    ),
}
