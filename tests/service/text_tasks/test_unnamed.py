"""Requests that name no checkpoint: each goes to the first loaded one that can do it, made for it before able to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.models import LoadedModel

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
TINY = ("entailment", "three-classes", "question-answering", "bart", "nllb")
SHIPPED = ("slimpajama-tiny-encoder", "slimpajama-tiny-lm")

EXPECTED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"input": "a story"}, "slimpajama-tiny-encoder"),
    ("/v1/similarity", {"source": "a story", "targets": ["a film"]}, "slimpajama-tiny-encoder"),
    ("/v1/rerank", {"query": "a story", "documents": ["a film"]}, "slimpajama-tiny-encoder"),
    ("/v2/rerank", {"query": "a story", "documents": ["a film"]}, "slimpajama-tiny-encoder"),
    ("/rerank", {"query": "a story", "documents": ["a film"]}, "slimpajama-tiny-encoder"),
    ("/v1/score", {"text_1": "a story", "text_2": ["a film"]}, "slimpajama-tiny-encoder"),
    ("/classify", {"input": "a story"}, "entailment"),
    ("/v1/classify", {"input": "a story"}, "entailment"),
    ("/v1/classify", {"input": "a story", "labels": ["sports", "music"]}, "entailment"),
    ("/v1/classify", {"input": "a story", "labels": ["sports", "music"], "samples": 2}, "slimpajama-tiny-lm"),
    ("/v1/classify", {"input": "a story", "head": "spam"}, "slimpajama-tiny-encoder"),
    ("/v1/sentiment", {"input": "a good story"}, "slimpajama-tiny-encoder"),
    ("/v1/summarize", {"input": "The king lost a war.", "max_tokens": 8}, "bart"),
    ("/v1/translate", {"input": "The king.", "source": "en", "target": "fr", "max_tokens": 4}, "nllb"),
    ("/v1/answer", {"question": "Who?", "context": "The king lost a war."}, "question-answering"),
    ("/v1/answer", {"question": "Who?", "max_tokens": 4}, "slimpajama-tiny-lm"),
    ("/v1/completions", {"prompt": "The king", "max_tokens": 4}, "bart"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}, "slimpajama-tiny-lm"),
    ("/v1/tokenize", {"text": "a story"}, "entailment"),
]
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("/", {"inputs": "a story"}),
    ("/embed", {"inputs": "a story"}),
    ("/embed_all", {"inputs": "a story"}),
    ("/predict", {"inputs": "a story"}),
    ("/rerank", {"query": "a story", "texts": ["a film"]}),
    ("/similarity", {"inputs": {"source_sentence": "a story", "sentences": ["a film"]}}),
    ("/tokenize", {"inputs": "a story"}),
    ("/hf/text-classification", {"inputs": "a story"}),
    ("/hf/zero-shot-classification", {"inputs": "a story", "parameters": {"candidate_labels": ["music", "sports"]}}),
    ("/hf/feature-extraction", {"inputs": "a story"}),
    ("/hf/sentence-similarity", {"inputs": {"source_sentence": "a story", "sentences": ["a film"]}}),
    ("/hf/summarization", {"inputs": "The king lost a war."}),
    ("/hf/translation", {"inputs": "The king.", "parameters": {"src_lang": "en", "tgt_lang": "fr"}}),
    ("/hf/question-answering", {"inputs": {"question": "Who?", "context": "The king lost a war."}}),
]


@pytest.fixture
def _everything(load: Callable[..., LoadedModel], engine: Any) -> None:
    for name in TINY:
        load(name)
    for name in SHIPPED:
        engine.load(CHECKPOINTS / name)


@pytest.mark.usefixtures("_everything")
async def test_the_first_that_can_do_it_answers(post: Callable[..., Any], client: httpx.AsyncClient) -> None:
    """One test for the table, so that the checkpoints are loaded once."""
    found = [(path, body, (await post(path, **body))["model"]) for path, body, _ in EXPECTED]
    assert found == EXPECTED
    for path, body in ADAPTERS:
        response = await client.post(path, json=body)
        assert response.status_code == 200, (path, response.text)


async def test_with_nothing_that_can_do_it_the_model_is_what_is_wrong(refused: Callable[..., Any]) -> None:
    for path, body, _ in EXPECTED:
        error = await refused(path, **body)
        wrong = ("head", "invalid_request") if "head" in body else ("model", "model_not_found")
        assert (error["param"], error["code"]) == wrong, (path, body)


@pytest.mark.usefixtures("_everything")
async def test_a_named_one_that_cannot_says_what_it_does_and_who_could(refused: Callable[..., Any]) -> None:
    for path, body, able in EXPECTED:
        if path in ("/v1/tokenize", "/v1/completions") or "head" in body:
            continue
        unable = "bart" if able != "bart" else "question-answering"
        error = await refused(path, model=unable, **body)
        assert error["param"] == "model", (path, error)
        assert able in error["message"], (path, error)


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/v1/completions", {"prompt": "The king", "max_tokens": 2}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
    "embed": ("/v1/embeddings", {"input": "a story"}),
    "similarity": ("/v1/similarity", {"source": "a story", "targets": ["a film"]}),
    "rerank": ("/v1/rerank", {"query": "a story", "documents": ["a film"]}),
    "classify": ("/v1/classify", {"input": "a story"}),
    "zero_shot": ("/v1/classify", {"input": "a story", "labels": ["sports", "music"]}),
    "sentiment": ("/v1/sentiment", {"input": "a story"}),
    "token_classify": ("/v1/tag", {"input": "Then Elizabeth went to London."}),
    "summarize": ("/v1/summarize", {"input": "The king lost a war.", "max_tokens": 4}),
    "translate": ("/v1/translate", {"input": "The king.", "source": "en", "target": "fr", "max_tokens": 4}),
    "answer": ("/v1/answer", {"question": "Who?", "context": "The king lost a war."}),
}


@pytest.mark.usefixtures("_everything")
async def test_whatever_a_checkpoint_is_listed_with_it_does(
    post: Callable[..., Any], client: httpx.AsyncClient
) -> None:
    """KServe's runtime declares question answering and refuses it."""
    num_asked = 0
    for card in (await client.get("/v1/models")).json()["data"]:
        for task in card["tasks"]:
            path, body = ASKED[task]
            if task == "classify" and not card["labels"]:
                body = body | {"labels": ["sports", "music"]}
            assert (await post(path, model=card["id"], **body))["model"] == card["id"]
            num_asked += 1
    assert num_asked > 20
