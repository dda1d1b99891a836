"""What the pipelines of `transformers` 4.57.6 answered, answered by the endpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).parents[2] / "reference" / "pipelines.json"
CASES = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]


def cases(task: str) -> list[Any]:
    found = [case for case in CASES if case["task"].startswith(task)]
    return [pytest.param(case, id=f"{case['checkpoint']}-{index}") for index, case in enumerate(found)]


def decoding(parameters: dict[str, Any]) -> dict[str, Any]:
    """The pipelines' names in ours; their lengths count the start token, except `max_new_tokens`."""
    values = {key: value for key, value in parameters.items() if key not in ("src_lang", "tgt_lang")}
    if "min_length" in values:
        values["min_tokens"] = values.pop("min_length") - 1
    if "max_length" in values:
        values["max_tokens"] = values.pop("max_length") - 1
    if "max_new_tokens" in values:
        values["max_tokens"] = values.pop("max_new_tokens")
    return values


@pytest.mark.parametrize("case", cases("question-answering"))
async def test_answers_have_the_recorded_texts_scores_and_places(
    case: dict[str, Any], load: Callable[..., Any], post: Callable[..., Any]
) -> None:
    load(case["checkpoint"])
    parameters = {key: value for key, value in case["parameters"].items() if key != "max_question_len"}
    answer = await post("/v1/answer", **case["inputs"], **parameters)
    assert answer["method"] == "extractive"
    expected = case["output"] if isinstance(case["output"], list) else [case["output"]]
    found = answer["data"][0]["answers"]
    assert [{**entry, "score": 0} for entry in found] == [{**entry, "score": 0} for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], rel=1e-4)
    context = case["inputs"]["context"]
    assert all(context[entry["start"] : entry["end"]] == entry["answer"] for entry in found)


@pytest.mark.parametrize("case", cases("summarization"))
async def test_summaries_are_the_recorded_ones(
    case: dict[str, Any], load: Callable[..., Any], post: Callable[..., Any]
) -> None:
    load(case["checkpoint"])
    answer = await post("/v1/summarize", input=case["inputs"], **decoding(case["parameters"]))
    assert answer["method"] == "abstractive"
    assert [entry["summary"] for entry in answer["data"]] == [entry["summary_text"] for entry in case["output"]]
    assert answer["usage"]["completion_tokens"] == len(case["ids"][0]) - 1


@pytest.mark.parametrize("case", cases("translation"))
async def test_translations_are_the_recorded_ones(
    case: dict[str, Any], load: Callable[..., Any], post: Callable[..., Any]
) -> None:
    load(case["checkpoint"])
    parameters = case["parameters"]
    _, source, _, target = case["task"].split("_") if "_" in case["task"] else [""] * 4
    languages = {"source": parameters.get("src_lang", source), "target": parameters.get("tgt_lang", target)}
    answer = await post("/v1/translate", input=case["inputs"][0], **languages, **decoding(parameters))
    assert [entry["translation"] for entry in answer["data"]] == [entry["translation_text"] for entry in case["output"]]
    assert {key: answer[key] for key in ("source", "target")} == languages
