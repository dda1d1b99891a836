"""Positive, neutral and negative, whatever a checkpoint calls its labels and whatever kind it is."""

from typing import Any

import httpx
import numpy as np
import pytest

TEXTS = ["a very good film", "bad dog"]


async def sentiment(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/sentiment", json={"input": TEXTS} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (["NEGATIVE", "POSITIVE"], [-1, 1]),
        (["POS", "NEG", "NEU"], [1, -1, 0]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [-1, 0, 1]),
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], [-1, -0.5, 0, 0.5, 1]),
        (["very positive", "positive", "neutral", "negative", "very negative"], [1, 0.5, 0, -0.5, -1]),
    ],
)
async def test_labels_become_classes_and_polarity(
    labels: list[str], values: list[float], make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_classifier(labels)[0])
    raw = (await client.post("/v1/classify", json={"input": TEXTS})).json()["data"]
    answer = await sentiment(client)
    assert answer["method"] == "classifier"
    for entry, own in zip(answer["data"], raw, strict=True):
        scores = {row["label"]: row["score"] for row in own["labels"]}
        shares = np.array([scores[label] for label in labels])
        expected = {
            "positive": shares[np.array(values) > 0].sum(),
            "neutral": shares[np.array(values) == 0].sum(),
            "negative": shares[np.array(values) < 0].sum(),
        }
        assert entry["scores"] == pytest.approx(expected, abs=1e-6)
        assert entry["polarity"] == pytest.approx(float(shares @ np.array(values)), abs=1e-6)
        assert entry["label"] == max(expected, key=lambda name: expected[name])
        assert entry["score"] == entry["scores"][entry["label"]] == pytest.approx(entry["confidence"])


async def test_each_kind_of_checkpoint_answers_and_the_best_is_taken(
    make_model: Any, make_classifier: Any, engine: Any, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.description.SMALL_BYTES", 0)
    ways = []
    steps = [
        lambda: make_classifier(["LABEL_0", "LABEL_1"], "unnamed"),
        lambda: make_model("BertModel", "embedder"),
        lambda: make_model("LlamaForCausalLM", "lm", num_key_value_heads=2, head_dim=8),
        lambda: make_classifier(["contradiction", "entailment"], "nli"),
        lambda: make_classifier(["neg", "pos"], "feelings"),
    ]
    for make in steps:
        engine.load(make()[0])
        answer = await sentiment(client)
        ways.append((answer["model"], answer["method"]))
        for entry in answer["data"]:
            assert sum(entry["scores"].values()) == pytest.approx(1.0)
            assert -1 <= entry["polarity"] <= 1
    assert ways == [
        ("unnamed", "classifier"), ("embedder", "similarity"), ("lm", "likelihood"), ("nli", "nli"),
        ("feelings", "classifier"),
    ]  # fmt: skip
    assert (await sentiment(client, model="lm"))["method"] == "likelihood"


async def test_a_classifier_of_something_else_is_refused_with_advice(
    make_classifier: Any, engine: Any, client: httpx.AsyncClient
) -> None:
    engine.load(make_classifier(["ham", "spam"], "filter")[0])
    nothing = await client.post("/v1/sentiment", json={"input": "x"})
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (404, "model")
    engine.load(make_classifier(["neg", "pos"], "feelings")[0])
    named = await client.post("/v1/sentiment", json={"input": "x", "model": "filter"})
    assert named.json()["error"]["code"] == "task_not_supported"
    assert "feelings" in named.json()["error"]["message"]


async def test_abstention(make_classifier: Any, engine: Any, client: httpx.AsyncClient) -> None:
    engine.load(make_classifier(["neg", "pos"])[0])
    entries = (await sentiment(client, abstain_below=1.0))["data"]
    assert [(entry["label"], entry["abstained"]) for entry in entries] == [(None, True)] * 2
    assert all(sum(entry["scores"].values()) == pytest.approx(1.0) for entry in entries)
