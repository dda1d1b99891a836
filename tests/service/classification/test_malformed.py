"""Wrong requests for labels and sentiment: each gets a 4xx that names the field, and the next good one is answered."""

from typing import Any

import httpx
import pytest

CLASSIFY, SENTIMENT = "/v1/classify", "/v1/sentiment"
HUGE = 10**30

BOTH: list[tuple[str, list[Any]]] = [
    ("model", [5, "", "nope", "../../etc/passwd", "a" * 300, ["own"], {}]),
    ("input", [5, True, {}, [], "the cat sat " * 50]),
    ("input.1", [["a", 5], ["a", {}], ["a", True]]),
    ("abstain_below", [-0.1, 1.1, "x", True, []]),
    ("priority", ["high", 1001]),
    ("timeout", [0, -1, "5"]),
    ("truncate", ["yes", 1]),
    ("no_such_field", [1]),
]
CLASSIFY_ONLY: list[tuple[str, list[Any]]] = [
    ("input.0", [[["a"]], [["a", "b", "c"]], [[]]]),
    ("input.0.1", [[["a", 5]]]),
    ("input.1", [[["a", "b"], "c"], ["a", ["b", "c"]]]),
    ("labels", [5, "a,b", [], {}, ["x"] * 600]),
    ("labels.1", [["a", ""], ["a", 5], ["a", " "], ["a", "x" * 2000], ["a", "a"]]),
    ("head", [5, "", "nope", "../heads"]),
    ("multi_label", ["yes", 1, True]),
    ("hypothesis_template", [5, "", "no place", "{} and {}", "{0}", "this is {} ."]),
    ("top_k", [0, -1, 1.5, "x", HUGE * 10]),
    ("raw_scores", ["no", 0]),
    ("samples", [0, -1, 65, 1.5, "x"]),
    ("temperature", [-1, 3, "x", 0.5]),
    ("seed", [1.5, "x", 2**63, 7]),
]


def table() -> list[Any]:
    rows = []
    for path, fields in ((CLASSIFY, [*BOTH, *CLASSIFY_ONLY]), (SENTIMENT, BOTH)):
        for param, values in fields:
            for number, value in enumerate(values):
                rows.append(pytest.param(path, param, value, id=f"{path.split('/')[2]}-{param}-{number}"))
    return rows


TOGETHER: list[tuple[str, dict[str, Any], str]] = [
    (CLASSIFY, {"labels": ["a", "b"], "head": "intent"}, "head"),
    (CLASSIFY, {"labels": ["a", "b"], "input": [["a", "b"]]}, "input"),
    (CLASSIFY, {"labels": ["a", "b"], "hypothesis_template": "no place"}, "hypothesis_template"),
    (CLASSIFY, {"labels": ["a", "b"], "hypothesis_template": "{} {}"}, "hypothesis_template"),
    (CLASSIFY, {"labels": ["a", "b"], "model": "own"}, "labels"),
    (CLASSIFY, {"samples": 3}, "labels"),
    (CLASSIFY, {"samples": 3, "labels": ["a"], "raw_scores": True}, "raw_scores"),
    (CLASSIFY, {"samples": 3, "labels": ["a"], "multi_label": True}, "multi_label"),
    (CLASSIFY, {"samples": 3, "labels": ["a"], "truncate": True}, "truncate"),
    (CLASSIFY, {"samples": 3, "labels": ["a"], "model": "own"}, "labels"),
    (CLASSIFY, {"labels": ["w" * 90, "b"]}, "input"),
    (CLASSIFY, {"labels": [f"label {n}" for n in range(500)], "input": ["x"] * 100}, "labels"),
    (CLASSIFY, {}, "input"),
    (SENTIMENT, {}, "input"),
    (SENTIMENT, {"input": [["a", "b"]]}, "input.0"),
    (SENTIMENT, {"input": "x", "labels": ["a"]}, "labels"),
    (SENTIMENT, {"input": "x", "model": "tagger"}, "model"),
    (CLASSIFY, {"input": "x", "model": "tagger"}, "model"),
    (CLASSIFY, {"input": "x", "model": "price", "abstain_below": 0.5}, "abstain_below"),
]


@pytest.fixture
def _loaded(make_model: Any, make_classifier: Any, engine: Any) -> None:
    engine.load(make_classifier(["neg", "pos"], "own")[0])
    engine.load(make_classifier(["contradiction", "entailment"], "nli")[0])
    engine.load(make_model("BertForTokenClassification", "tagger", num_labels=3)[0])
    engine.load(make_classifier(["low", "high"], "price", problem_type="regression")[0])


async def refuse(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    response = await client.post(path, json=body)
    assert 400 <= response.status_code < 500, response.text[:300]
    error = response.json()["error"]
    assert error["param"] == param, (body, error)
    assert len(error["message"]) < 2000


@pytest.mark.usefixtures("_loaded")
async def test_a_wrong_field_is_named_and_the_next_request_answered(client: httpx.AsyncClient) -> None:
    """One test for the table, so that the checkpoints are made once."""
    for row in table():
        path, param, value = row.values
        body = {"input": "x"} | {param.split(".")[0]: value}
        await refuse(client, path, body, param)
        assert (await client.post(path, json={"input": "x"})).status_code == 200


@pytest.mark.usefixtures("_loaded")
async def test_what_does_not_fit_together_is_named(client: httpx.AsyncClient) -> None:
    for path, body, param in TOGETHER:
        whole = {"input": "x"} | body if body and "input" not in body else body
        await refuse(client, path, whole, param)


def test_the_table_is_as_large_as_promised() -> None:
    assert len(table()) + len(TOGETHER) >= 100
