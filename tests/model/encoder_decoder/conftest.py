"""Tiny random encoder-decoder checkpoints of every family, as `transformers` makes and saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB_SIZE = 96
T5_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}
MARIAN = {
    "scale_embedding": True,
    "activation_function": "swish",
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
    "flan-t5": lambda: T5ForConditionalGeneration(
        T5Config(**T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5_SIZES)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART_SIZES)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART_SIZES, scale_embedding=True)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART_SIZES, **MARIAN, pad_token_id=95, decoder_start_token_id=95)),
    "marian-two-vocabularies": lambda: MarianMTModel(
        MarianConfig(
            **BART_SIZES,
            **MARIAN,
            decoder_vocab_size=80,
            share_encoder_decoder_embeddings=False,
            pad_token_id=79,
            decoder_start_token_id=79,
        )
    ),
    "m2m100": lambda: M2M100ForConditionalGeneration(M2M100Config(**BART_SIZES)),
    "pegasus": lambda: PegasusForConditionalGeneration(
        PegasusConfig(**BART_SIZES, scale_embedding=True, activation_function="relu")
    ),
}


END_BIAS = {"bart": 4.0, "marian": 4.5, "mbart": 1.0, "pegasus": 0.0}
"""What makes these seeds' texts end at different lengths."""


def enliven(model: PreTrainedModel) -> None:
    """Weights so large that what is generated depends on source and position, and now and then ends."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
        elif "shared" in name or "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(std=0.5)
        model.final_logits_bias[0, model.config.eos_token_id] = END_BIAS[model.config.model_type]


SaveSeq2Seq = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def save_seq2seq(tmp_path_factory: pytest.TempPathFactory) -> SaveSeq2Seq:
    """`save_seq2seq(family, seed=0, **generation)` gives a folder and the model that is in it."""

    def save(family: str, seed: int = 0, **generation: Any) -> tuple[Path, PreTrainedModel]:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval()
        enliven(model)
        for name, value in generation.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(folder)
        return folder, model

    return save


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
