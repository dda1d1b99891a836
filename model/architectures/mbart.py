"""mBART and mBART-50: BART with norms on the inputs of sublayers and one at the end of each side (arXiv 2001.08210).

Maps `config.json` onto `EncoderDecoderConfig`; tensor names are BART's. Knows no tensors.
"""

from dataclasses import replace

from model.architectures import bart
from model.architectures.mapping import Architecture
from model.architectures.raw import RawConfig
from model.config import EncoderDecoderConfig


def configure(raw: RawConfig, limit: int | None) -> EncoderDecoderConfig:
    config = bart.configure(raw, limit)
    return replace(config, architecture="MBartForConditionalGeneration", norm_first=True, final_norm=True)


ARCHITECTURES = {
    "MBartForConditionalGeneration": Architecture(
        network="encoder_decoder", head="language_model", configure=configure, weights=bart.weights
    ),
}
