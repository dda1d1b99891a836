"""The encoders of T5 and its kin, by themselves: transformers' states, and sentence-transformers' vectors of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from transformers import BertTokenizerFast, PreTrainedModel

from model.description import describe

Run = Callable[..., list[NDArray[np.float32]]]
SaveModel = Callable[[PreTrainedModel], Path]

SIZES = {
    "vocab_size": 90,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
}


def make(prefix: str, suffix: str = "EncoderModel", **changes: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **changes)
    model: PreTrainedModel = getattr(transformers, f"{prefix}{suffix}")(config).eval()
    return model


@pytest.mark.parametrize("prefix", ["T5", "MT5", "UMT5"])
def test_states_are_those_of_transformers(prefix: str, save_model: SaveModel, run: Run, texts: list[list[int]]) -> None:
    model = make(prefix, feed_forward_proj="gated-gelu")
    folder = save_model(model)
    found = describe(folder)
    assert (found.head, found.network, found.embedding_size) == ("embedding", "encoder", 32)
    assert {"embed", "rerank"} <= set(found.tasks)
    for ids, states in zip(texts, run(folder, texts), strict=True):
        with torch.no_grad():
            assert_allclose(states, model(torch.tensor([ids])).last_hidden_state[0], atol=1e-4)


def test_a_decoder_that_is_stored_beside_it_is_left_aside(
    save_model: SaveModel, run: Run, texts: list[list[int]]
) -> None:
    alone = make("T5")
    folder = save_model(alone)
    before = run(folder, texts)
    whole = make("T5", "ForConditionalGeneration").state_dict()
    weights = load_file(folder / "model.safetensors")
    extra = {name: tensor for name, tensor in whole.items() if name.startswith("decoder.block")}
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    for states, expected in zip(run(folder, texts), before, strict=True):
        assert_allclose(states, expected)


def test_vectors_are_those_of_sentence_transformers(
    save_model: SaveModel, run: Run, tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    """As sentence-t5 and gtr-t5 store them: a mean, a projection without a bias, and the length of 1."""
    base = save_model(make("T5"))
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    dense = models.Dense(32, 12, bias=False, activation_function=torch.nn.Identity())
    parts = [models.Transformer(str(base)), models.Pooling(32), dense, models.Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.save(str(tmp_path / "saved"), create_model_card=False)
    sentences = ["the cat sat on the mat", "good", "very bad film and the dog ran to the far hill"]
    vectors = run(tmp_path / "saved", tokenizer(sentences)["input_ids"], "embedding")
    assert_allclose(np.stack(vectors), model.encode(sentences), atol=1e-5)
