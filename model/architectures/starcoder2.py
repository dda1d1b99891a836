"""StarCoder2 (arXiv 2402.19173) onto `DecoderConfig`: Llama with LayerNorms, a plain MLP and biases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.architectures.llama import configure_llama, decoder, optional_window, windows, with_defaults
from model.architectures.raw import RawConfig
from model.config import DecoderConfig

STARCODER2_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def configure_starcoder2(raw: RawConfig, limit: int | None) -> DecoderConfig:
    raw = with_defaults(raw, STARCODER2_DEFAULTS)
    bias = raw.flag("use_bias", True)
    return replace(
        configure_llama(raw, limit),
        architecture="Starcoder2ForCausalLM",
        norm="layer",
        norm_epsilon=raw.number("norm_epsilon", 1e-5),
        windows=windows(raw, optional_window(raw)),
        query_key_value_bias=bias,
        attention_output_bias=bias,
        gated=False,
        mlp_bias=bias,
    )


RENAMED = ((".mlp.c_fc.", ".mlp.up_proj."), (".mlp.c_proj.", ".mlp.down_proj."))

ARCHITECTURES = {"Starcoder2ForCausalLM": decoder(configure_starcoder2, renamed=RENAMED)}
