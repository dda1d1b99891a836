"""M2M100 and NLLB: mBART without the norm of the embeddings and the bias of the logits, with sinusoidal positions.

Maps `config.json` onto `EncoderDecoderConfig`; tensor names are BART's. Knows no tensors.
"""

from dataclasses import replace

from model.architectures import bart
from model.architectures.llama import UNBOUNDED
from model.architectures.mapping import Architecture
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig

DEFAULTS = {"scale_embedding": True, "activation_function": "relu"}
"""What an absent key means, where it is not what it means for BART."""


def configure(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    raw = RawConfig(DEFAULTS | dict(raw.values), raw.file)
    return replace(
        bart.configure(raw, limit, most=UNBOUNDED),
        architecture="M2M100ForConditionalGeneration",
        norm_first=True,
        embedding_norm=False,
        final_norm=True,
        positions="tensor2tensor",
        # fairseq numbers positions from the one after the padding id (arXiv 2010.11125 was trained with it).
        position_offset=raw.whole("pad_token_id", 1) + 1,
        logits_bias=False,
    )


ARCHITECTURES = {
    "M2M100ForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=bart.weights
    ),
}
