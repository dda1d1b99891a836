"""Heads as the training recipe writes them give in the service's runner the logits that they gave in training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import save_file
from transformers import PreTrainedModel

from model.encode_network import EncodeOutput
from model.encoder_runner import EncodeItem, EncoderRunner
from model.errors import CheckpointError
from model.training.heads import Head, HeadConfig, load_head, save_head

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeRunner = Callable[[Path], EncoderRunner]

CONFIGS = {
    "topic": HeadConfig(kind="classification", input="cls", labels=("a", "b", "c"), max_length=64),
    "mood": HeadConfig(kind="classification", input="embedding", labels=("neg", "pos"), max_length=64),
    "parts": HeadConfig(kind="token", input="tokens", labels=("O", "NAME", "DATE"), max_length=64),
    "span": HeadConfig(kind="span", input="tokens", labels=(), max_length=64),
}


@pytest.fixture
def folder(make_model: MakeModel) -> tuple[Path, PreTrainedModel]:
    """A body in the layout of the shipped encoder: mean pooling, unit length."""
    place, model = make_model("bert")
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        save_head(Head(config, 32), place / "heads" / name, temperature=1.5)
    return place, model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_trained_head_gives_its_logits(
    name: str, folder: tuple[Path, PreTrainedModel], make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    place, model = folder
    head = load_head(place / "heads" / name)
    outputs: dict[str, EncodeOutput] = {"span": "span_logits", "parts": "token_logits"}
    items = [EncodeItem(ids=ids, output=outputs.get(name, "logits"), head=name) for ids in texts]
    for ids, found in zip(texts, make_runner(place).run(items), strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state
            expected = head(hidden, torch.ones(1, len(ids), dtype=torch.bool))[0]
        assert isinstance(found, np.ndarray)
        assert_allclose(found, expected, atol=1e-4)


def test_heads_and_embeddings_share_one_forward(
    folder: tuple[Path, PreTrainedModel], make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    runner = make_runner(folder[0])
    kinds = [("logits", "topic"), ("embedding", ""), ("span_logits", "span"), ("logits", "mood")]
    items = [
        EncodeItem(ids=ids, output=kinds[n % 4][0], head=kinds[n % 4][1])  # type: ignore[arg-type]
        for n, ids in enumerate(texts)
    ]
    for item, found in zip(items, runner.run(items), strict=True):
        [alone] = runner.run([item])
        assert isinstance(found, np.ndarray)
        assert isinstance(alone, np.ndarray)
        assert_allclose(found, alone, atol=1e-5)


def test_a_head_that_is_not_there_or_gives_something_else_is_named(
    folder: tuple[Path, PreTrainedModel], make_runner: MakeRunner
) -> None:
    runner = make_runner(folder[0])
    faults = runner.run(
        [
            EncodeItem(ids=[5], output="logits", head="nope"),
            EncodeItem(ids=[5], output="logits", head="span"),
            EncodeItem(ids=[5], output="embedding", head="mood"),
        ]
    )
    assert faults == [
        "this checkpoint has no head 'nope'",
        "the head 'span' gives span_logits, not logits",
        "the head 'mood' gives logits, not embedding",
    ]


def test_a_head_of_the_wrong_size_is_refused(folder: tuple[Path, PreTrainedModel], make_runner: MakeRunner) -> None:
    weights = folder[0] / "heads" / "topic" / "model.safetensors"
    save_file({"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError):
        make_runner(folder[0])
