"""Votes of an encoder-decoder that was trained to be asked: about labels, and about answers."""

from collections.abc import Callable
from typing import Any

import pytest

from service.engine.models import LoadedModel

LABELS = ["good film", "bad film", "war"]
BODY: dict[str, Any] = {
    "input": ["the king lost a great war .", "a good film"],
    "labels": LABELS,
    "samples": 8,
    "seed": 3,
}


@pytest.mark.parametrize("temperature", [0.0, 2.0])
async def test_every_sample_of_an_encoder_decoder_is_one_of_the_labels(
    load: Callable[..., LoadedModel], post: Callable[..., Any], engine: Any, temperature: float
) -> None:
    """It answered questions by a vote and refused to do so for labels."""
    load("t5")
    answer = await post("/v1/classify", **BODY, temperature=temperature)
    assert (answer["model"], answer["method"]) == ("t5", "self_consistency")
    for entry in answer["data"]:
        assert set(entry["votes"]) <= set(LABELS)
        assert sum(entry["votes"].values()) == 8
        assert entry["confidence"] == max(entry["votes"].values()) / 8
    if temperature == 0:
        assert [entry["confidence"] for entry in answer["data"]] == [1.0, 1.0]
    else:
        assert any(len(entry["votes"]) > 1 for entry in answer["data"])
    assert len({request.sampling.seed for request in engine.generated}) == 8
    assert len({tuple(request.encoder_ids) for request in engine.generated}) == 2
    again = await post("/v1/classify", **BODY, temperature=temperature)
    assert again["data"] == answer["data"]


async def test_a_translator_is_not_asked(load: Callable[..., LoadedModel], refused: Callable[..., Any]) -> None:
    load("nllb")
    error = await refused("/v1/classify", model="nllb", **BODY)
    assert (error["param"], error["code"]) == ("model", "task_not_supported")


async def test_answers_of_an_encoder_decoder_are_voted_on(
    load: Callable[..., LoadedModel], post: Callable[..., Any]
) -> None:
    load("t5")
    body = {"question": "who lost ?", "context": "the king lost a war .", "samples": 4, "max_tokens": 3, "seed": 1}
    [entry] = (await post("/v1/answer", **body))["data"]
    assert sum(vote["votes"] for vote in entry["votes"]) == 4
    assert entry["confidence"] == entry["votes"][0]["votes"] / 4
