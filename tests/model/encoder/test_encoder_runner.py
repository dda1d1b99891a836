"""The runner: one forward for every kind of output, and faults that stay with the item that has them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model.attention.interface import Attend
from model.encode_network import load_encode_network
from model.encoder_runner import EncodeItem, EncoderRunner

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeRunner = Callable[[Path], EncoderRunner]


def test_different_outputs_share_one_forward(
    make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("bert")
    runner = make_runner(folder)
    alone = [runner.run([EncodeItem(ids=ids, output="token_embeddings")])[0] for ids in texts]
    calls = []
    forward = runner.network.forward

    def counted(ids: torch.Tensor, type_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        calls.append(len(ids))
        return forward(ids, type_ids, positions, attend)

    monkeypatch.setattr(runner.network, "forward", counted)
    kinds = ["embedding", "token_embeddings"]
    mixed = runner.run([EncodeItem(ids=ids, output=kinds[place % 2]) for place, ids in enumerate(texts)])
    assert calls == [sum(map(len, texts))]
    for place, (found, expected) in enumerate(zip(mixed, alone, strict=True)):
        assert isinstance(found, np.ndarray)
        assert isinstance(expected, np.ndarray)
        assert found.dtype == np.float32
        assert_allclose(found, expected.mean(axis=0) if place % 2 == 0 else expected, atol=1e-5)


def test_what_runs_in_parts_is_what_runs_at_once(
    make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which computes one part while the next is made ready."""
    runner = make_runner(make_model("bert")[0])
    kinds = ["embedding", "token_embeddings"]
    items = [EncodeItem(ids=ids, output=kinds[place % 2]) for place, ids in enumerate(texts)]
    whole = runner.run(items)
    calls = []
    forward = runner.network.forward

    def counted(ids: torch.Tensor, type_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        calls.append(len(ids))
        return forward(ids, type_ids, positions, attend)

    monkeypatch.setattr(runner.network, "forward", counted)
    # Of 5, 61, 1, 17, 2, 40 and 17 tokens; a part that is full to the last token is one.
    parts = {60: [5, 61 + 1 + 17 + 2, 40 + 17], 66: [5 + 61, 1 + 17 + 2 + 40, 17]}
    for part_tokens, expected_calls in parts.items():
        calls.clear()
        monkeypatch.setattr(runner, "_part_tokens", part_tokens)
        found = runner.run(items)
        assert calls == expected_calls
        for part, expected in zip(found, whole, strict=True):
            assert isinstance(part, np.ndarray)
            assert isinstance(expected, np.ndarray)
            assert_allclose(part, expected, atol=1e-5)


def test_faults_are_named_and_leave_the_others_alone(make_model: MakeModel, make_runner: MakeRunner) -> None:
    folder, _ = make_model("bert", "ForSequenceClassification")
    good = EncodeItem(ids=[5, 6, 7], output="logits")
    bad = {
        "the input has no tokens": EncodeItem(ids=[], output="logits"),
        "the input has 81 tokens; the limit is 80": EncodeItem(ids=[5] * 81, output="logits"),
        "vocabulary of 90": EncodeItem(ids=[5, 90], output="logits"),
        "outside this checkpoint's vocabulary": EncodeItem(ids=[-1], output="logits"),
        "token type outside this checkpoint's 2": EncodeItem(ids=[5], type_ids=[2], output="logits"),
        "3 tokens and 2 token types": EncodeItem(ids=[5, 6, 7], type_ids=[0, 1], output="logits"),
        "gives logits, token_embeddings, not embedding": EncodeItem(ids=[5], output="embedding"),
    }
    runner = make_runner(folder)
    results = runner.run([good, *bad.values(), good])
    expected = runner.run([good])[0]
    assert isinstance(expected, np.ndarray)
    for message, result in zip(bad, results[1:-1], strict=True):
        assert isinstance(result, str)
        assert message in result
    for result in (results[0], results[-1]):
        assert isinstance(result, np.ndarray)
        assert_allclose(result, expected, atol=1e-5)
    assert all(isinstance(result, str) for result in runner.run(list(bad.values())))


EMBEDDINGS = ("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight")


@pytest.mark.parametrize("position", [0, 3])
def test_text_that_gives_nan_fails_alone(
    position: int, family: str, make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    """One token's embedding is broken: a padded neighbour that copies it must not take NaN from it."""
    folder, _ = make_model(family)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(EMBEDDINGS))
    weights[name][70] = float("nan")
    save_file(weights, folder / "model.safetensors")
    clean = [[token if token != 70 else 71 for token in ids] for ids in texts]
    poisoned = [*clean[:position], [70, 8, 9], *clean[position:]]
    runner = make_runner(folder)
    results = runner.run([EncodeItem(ids=ids, output="embedding") for ids in poisoned])
    expected = runner.run([EncodeItem(ids=ids, output="embedding") for ids in clean])
    assert results[position] == "the checkpoint's output for this input is not finite"
    for found, wanted in zip([*results[:position], *results[position + 1 :]], expected, strict=True):
        assert isinstance(found, np.ndarray)
        assert isinstance(wanted, np.ndarray)
        assert_allclose(found, wanted, atol=1e-5)


def test_longest_input_is_accepted(family: str, make_model: MakeModel, make_runner: MakeRunner) -> None:
    folder, _ = make_model(family)
    runner = make_runner(folder)
    longest = EncodeItem(ids=[7] * runner.context_length, output="token_embeddings")
    too_long = EncodeItem(ids=[7] * (runner.context_length + 1), output="token_embeddings")
    found, fault = runner.run([longest, too_long])
    assert isinstance(found, np.ndarray)
    assert found.shape == (runner.context_length, 32)
    assert isinstance(fault, str)


def test_roberta_keeps_its_padding_row_from_positions(make_model: MakeModel, make_runner: MakeRunner) -> None:
    folder, _ = make_model("roberta")
    assert make_runner(folder).context_length == 80 - 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_give_nearly_the_same_vectors(
    dtype: torch.dtype, make_model: MakeModel, make_runner: MakeRunner, texts: list[list[int]]
) -> None:
    folder, _ = make_model("bert")
    full = make_runner(folder)
    narrow = EncoderRunner(load_encode_network(folder, dtype=dtype), full.backend)
    items = [EncodeItem(ids=ids, output="embedding") for ids in texts]
    for ours, expected in zip(narrow.run(items), full.run(items), strict=True):
        assert isinstance(ours, np.ndarray)
        assert isinstance(expected, np.ndarray)
        assert ours.dtype == np.float32
        assert ours @ expected / np.linalg.norm(ours) / np.linalg.norm(expected) > 0.99
