"""One item whose numbers are not finite fails alone, on every endpoint that takes several, whatever reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.engine.models import LoadedModel

ENCODER = Path(__file__).parents[3] / "checkpoints" / "slimpajama-tiny-encoder"
GOOD, POISON = "the king lost a war", "the queen"
ITEMS = [GOOD, POISON, "a good film"]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/embeddings", "encoder", {"input": ITEMS}),
    ("/v1/similarity", "encoder", {"source": GOOD, "targets": ITEMS}),
    ("/v1/similarity", "encoder", {"pairs": [[GOOD, item] for item in ITEMS]}),
    ("/v1/classify", "three-classes", {"input": ITEMS}),
    ("/v1/classify", "entailment", {"input": ITEMS, "labels": ["war", "film"]}),
    ("/v1/classify", "encoder", {"input": ITEMS, "labels": ["war", "film"]}),
    ("/v1/classify", "encoder", {"input": ITEMS, "head": "spam"}),
    ("/v1/sentiment", "entailment", {"input": ITEMS}),
    ("/v1/summarize", "encoder", {"input": ITEMS}),
    ("/v1/answer", "question-answering", {"question": "who ?", "context": ITEMS}),
]


@pytest.mark.parametrize(("path", "name", "body"), CASES, ids=[f"{case[0][4:]}-{case[1]}" for case in CASES])
async def test_a_poisoned_item_fails_alone(
    path: str, name: str, body: dict[str, Any], load: Callable[..., LoadedModel], engine: Any, post: Callable[..., Any]
) -> None:
    model = engine.load(ENCODER, "encoder") if name == "encoder" else load(name)
    healthy = (await post(path, model=name, **body))["data"]
    engine.poison = set(model.tokenizer.encode("queen", add_special_tokens=False))
    answer = await post(path, model=name, **body)
    assert ["error" in item for item in answer["data"]] == [False, True, False]
    assert answer["data"][1]["error"]["code"] == "generation_failed"
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert [answer["data"][0], answer["data"][2]] == [healthy[0], healthy[2]]


async def test_a_poisoned_document_fails_alone(engine: Any, post: Callable[..., Any]) -> None:
    model = engine.load(ENCODER, "encoder")
    engine.poison = set(model.tokenizer.encode("queen", add_special_tokens=False))
    answer = await post("/v1/rerank", query=GOOD, documents=ITEMS)
    assert sorted(result["index"] for result in answer["results"]) == [0, 2]
    assert [error["index"] for error in answer["errors"]] == [1]


@pytest.mark.parametrize(("path", "name"), [("/v1/summarize", "bart"), ("/v1/translate", "nllb")])
async def test_a_poisoned_text_to_be_written_about_fails_alone(
    path: str, name: str, checkpoint: Callable[[str], Path], engine: Any, post: Callable[..., Any]
) -> None:
    """A source whose states are not finite: the network's own, not a stand-in's."""
    engine.load(checkpoint(name), "healthy")
    spoil(engine, engine.load(checkpoint(name), "spoiled"), "queen")
    body = {"input": ITEMS, "max_tokens": 6, "num_beams": 1}
    if path == "/v1/translate":
        body |= {"source": "en", "target": "fr"}
    healthy = (await post(path, model="healthy", **body))["data"]
    answer = await post(path, model="spoiled", **body)
    assert ["error" in item for item in answer["data"]] == [False, True, False]
    assert [answer["data"][0], answer["data"][2]] == [healthy[0], healthy[2]]


def spoil(engine: Any, model: LoadedModel, word: str) -> None:
    """Makes the embedding of one word not finite."""
    (id,) = set(model.tokenizer.encode(word, add_special_tokens=False)) - set(
        model.tokenizer.encode(" ".join([GOOD, *ITEMS[::2]]), add_special_tokens=False)
    )
    network = engine._lanes[model.key]._runner.network
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and parameter.shape[0] == model.description.vocab_size and "encoder" in name:
            parameter.data[id] = float("nan")
            return
    raise AssertionError("the encoder has no embedding of the vocabulary")
