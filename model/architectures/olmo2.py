"""OLMo 2 (arXiv 2501.00656) onto `DecoderConfig`: Llama with its norms on the sublayers' outputs, and QK-norm."""

from dataclasses import replace

from model.architectures.llama import configure_llama, decoder
from model.architectures.raw import RawConfig
from model.config import DecoderConfig


def configure_olmo2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    return replace(
        configure_llama(raw, limit),
        architecture="Olmo2ForCausalLM",
        norm_epsilon=raw.number("rms_norm_eps", 1e-5),
        norm_places="after",
        query_key_norm="full",
    )


ARCHITECTURES = {"Olmo2ForCausalLM": decoder(configure_olmo2)}
