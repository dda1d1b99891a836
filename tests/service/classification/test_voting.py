"""Several samples and their vote: who wins, what agreement means, and what the model is let say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.tasks.voting import normalized, vote

STORIES = Path(__file__).parents[4] / "shared/data/stories260K-hf"
CHAT = Path(__file__).parents[3] / "checkpoints/slimpajama-tiny-lm"
LABELS = ["happy", "sad", "very sad"]


def test_answers_are_counted_whatever_their_dress() -> None:
    found = vote(["Paris", "the paris.", "Rome", None])
    assert (found.winner, found.votes, found.agreement, found.num_samples) == ("Paris", {"Paris": 2, "Rome": 1}, 0.5, 4)


def test_of_equals_the_one_given_first_wins() -> None:
    assert vote(["b", "c", "c", "b"]).winner == "b"


def test_nothing_but_abstentions_elects_nobody() -> None:
    found = vote([None, None])
    assert (found.winner, found.agreement, found.votes) == (None, 0.0, {})


@pytest.mark.parametrize(("text", "expected"), [("The  Cat!", "cat"), ("!?", "!?"), ("A", "a"), ("C++", "c")])
def test_answers_are_compared_as_squad_does(text: str, expected: str) -> None:
    assert normalized(text) == expected


def test_exact_answers_stay_apart() -> None:
    assert vote(["C", "C++", "C++"], same=str).votes == {"C++": 2, "C": 1}


@pytest.fixture(params=[STORIES, CHAT], ids=["plain", "chat"])
def ask(engine: Any, client: httpx.AsyncClient, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A checkpoint without a chat template, and one that is asked through its own."""
    if not request.param.is_dir():
        pytest.skip(f"{request.param.name} is not here")
    model = engine.load(request.param)
    assert (model.chat_template is not None) is (request.param == CHAT)

    async def post(**body: Any) -> dict[str, Any]:
        whole = {"input": "Lily was crying.", "labels": LABELS, "samples": 8, "seed": 3} | body
        response = await client.post("/v1/classify", json=whole)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    return post


async def test_every_sample_is_one_of_the_labels(ask: Callable[..., Any]) -> None:
    answer = await ask(temperature=2.0)
    [entry] = answer["data"]
    assert answer["method"] == "self_consistency"
    assert set(entry["votes"]) <= set(LABELS)
    assert sum(entry["votes"].values()) == 8
    assert entry["confidence"] == entry["score"] == max(entry["votes"].values()) / 8
    assert entry["labels"][0]["label"] == entry["label"]


async def test_the_same_seed_gives_the_same_votes(ask: Callable[..., Any]) -> None:
    first, second = await ask(temperature=2.0), await ask(temperature=2.0)
    assert first["data"] == second["data"]


async def test_greedy_samples_agree(ask: Callable[..., Any]) -> None:
    [entry] = (await ask(temperature=0.0))["data"]
    assert (entry["confidence"], entry["abstained"]) == (1.0, False)


async def test_disagreement_below_the_limit_abstains(ask: Callable[..., Any]) -> None:
    [entry] = (await ask(temperature=2.0, abstain_below=1.0))["data"]
    assert entry["abstained"] is (entry["confidence"] < 1.0)
    assert (entry["label"] is None) is entry["abstained"]


async def test_samples_of_a_text_share_its_prompt(ask: Callable[..., Any], engine: Any) -> None:
    answer = await ask(samples=4)
    assert len({tuple(request.prompt_ids) for request in engine.generated}) == 1
    assert len({request.sampling.seed for request in engine.generated}) == 4
    assert answer["usage"]["prompt_tokens"] == len(engine.generated[0].prompt_ids)


async def test_the_question_is_put_in_the_checkpoints_own_template(ask: Callable[..., Any], engine: Any) -> None:
    await ask(samples=2)
    [model] = engine.models.values()
    prompt = model.tokenizer.decode(engine.generated[0].prompt_ids, skip_special_tokens=False)
    if model.chat_template is None:
        assert prompt.endswith("Lily was crying.\nThis example is")
    else:
        assert prompt.startswith("<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert all(label in prompt for label in LABELS)
