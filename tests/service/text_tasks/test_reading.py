"""Answers from contexts: windows, impossible answers, items of a batch, heads on an encoder, wrong requests."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service.engine.models import LoadedModel
from service.engine.protocol import EncodeInput
from service.errors import InvalidRequest
from service.tasks import answering
from service.tasks.span_answers import (
    SpanOptions,
    Window,
    WindowAnswers,
    _best_spans,
    add_window,
    best_answers,
    cut_windows,
)

CONTEXT = "The king lived in a house-boat, on the river. The queen wrote a book about it in 1912."
LONG = " ".join([CONTEXT] * 8)


def test_windows_hold_the_whole_context_and_share_their_stride(load: Callable[..., LoadedModel]) -> None:
    tokenizer = load("question-answering").tokenizer
    options = SpanOptions(max_seq_len=30, doc_stride=7)
    windows = cut_windows(tokenizer, "Who?", LONG, options, limit=128)
    whole = tokenizer.encode_with_offsets("Who?", LONG).offsets[4:-1]
    assert len(windows) > 5
    assert all(len(window.input.ids) <= 30 for window in windows)
    assert all(len(window.input.ids) == 30 for window in windows[:-1])
    joined = list(windows[0].offsets)
    for window in windows[1:]:
        assert joined[-7:] == list(window.offsets[:7])
        joined += window.offsets[7:]
    assert joined == whole


def test_a_stride_that_has_the_context_read_very_often_is_refused_with_the_numbers(
    load: Callable[..., LoadedModel],
) -> None:
    """One token further each time, a context of 2 MB made hundreds of thousands of windows."""
    tokenizer = load("question-answering").tokenizer
    room = 128 - len(tokenizer.encode_with_offsets("Who?", "").offsets) - 1
    with pytest.raises(InvalidRequest, match="windows of 128 tokens are needed") as caught:
        cut_windows(tokenizer, "Who?", LONG * 4, SpanOptions(doc_stride=room - 2), limit=128)
    assert caught.value.param == "doc_stride"
    with pytest.raises(InvalidRequest) as caught:
        cut_windows(tokenizer, "king " * 120, LONG * 4, SpanOptions(), limit=128)
    assert caught.value.param == "question"
    assert len(cut_windows(tokenizer, "Who?", LONG, SpanOptions(), limit=128)) > 1


def test_windows_are_cut_in_time_proportional_to_the_context(load: Callable[..., LoadedModel]) -> None:
    """The encoding's lists were made anew for each token of each window: minutes for a context of 1 MB."""
    tokenizer = load("question-answering").tokenizer
    began = time.monotonic()
    assert len(cut_windows(tokenizer, "Who?", LONG * 100, SpanOptions(), limit=128)) > 100
    assert time.monotonic() - began < 10


def test_the_best_spans_are_those_of_a_whole_sort() -> None:
    rng = np.random.default_rng(0)
    shares = np.round(rng.random((300, 2)), 1).astype(np.float32)  # with many that are equal
    every = [(start, end, shares[start, 0] * shares[end, 1]) for start in range(300) for end in range(start, 300)]
    allowed = [span for span in every if span[1] - span[0] < 512 and span[2] > 0]
    for count in (1, 20, len(allowed) + 5):
        expected = sorted(allowed, key=lambda span: -span[2])[:count]
        assert _best_spans(shares, count, 512) == [(start, end, float(score)) for start, end, score in expected]


async def test_many_candidates_are_weighed_beside_the_event_loop(
    load: Callable[..., LoadedModel], post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load("question-answering")
    threads = []

    def add(*arguments: Any) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        add_window(*arguments)

    monkeypatch.setattr(answering, "add_window", add)
    await post("/v1/answer", question="Who?", context=CONTEXT)
    await post("/v1/answer", question="Who?", context=LONG * 4, max_answer_len=512)
    assert threads[0]
    assert not any(threads[1:])


def test_equal_answers_of_windows_are_added_up_whatever_their_case() -> None:
    options = SpanOptions(top_k=2, align_to_words=False)
    found = WindowAnswers()
    for context_offset in (0, 5):
        window = Window(
            input=EncodeInput(ids=[1, 2, 3]), first=1, offsets=[(context_offset, context_offset + 3)], words=[0]
        )
        add_window(found, window, np.zeros((3, 2), dtype=np.float32), "Ann, ann", options)
    (answer,) = best_answers(found, options)
    assert (answer.text, answer.start, answer.end, answer.score) == ("Ann", 0, 3, 2.0)


def test_answers_are_as_long_as_is_allowed_and_forward() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, 2)).astype(np.float32) * 3
    window = Window(input=EncodeInput(ids=[0] * 9), first=2, offsets=[(n, n + 1) for n in range(6)], words=[None] * 6)
    options = SpanOptions(top_k=50, max_answer_len=2)
    found = WindowAnswers()
    add_window(found, window, logits, "abcdef", options)
    starts, ends = (np.exp(logits[2:8, side]) / np.exp(logits[2:8, side]).sum() for side in (0, 1))
    expected = {"abcdef"[n : m + 1]: starts[n] * ends[m] for n in range(6) for m in range(n, min(n + 2, 6))}
    assert {answer.text: answer.score for answer in found.answers} == pytest.approx(expected, rel=1e-5)


async def test_all_windows_of_a_request_are_one_call(
    load: Callable[..., LoadedModel], engine: Any, post: Callable[..., Any]
) -> None:
    load("question-answering")
    answer = await post("/v1/answer", question=["Who?", "Where?"], context=LONG, max_seq_len=40, doc_stride=8)
    (request,) = engine.encoded
    assert request.output == "span_logits"
    assert sum(item["windows"] for item in answer["data"]) == len(request.inputs) > 10
    assert answer["usage"]["prompt_tokens"] == sum(len(entry.ids) for entry in request.inputs)


async def test_a_crowd_is_answered_as_each_alone(load: Callable[..., LoadedModel], post: Callable[..., Any]) -> None:
    load("question-answering")
    questions = ["Who wrote a book?", "Where did the king live?", "When?"]
    together = await post("/v1/answer", question=questions, context=CONTEXT, top_k=3)
    for question, item in zip(questions, together["data"], strict=True):
        alone = await post("/v1/answer", question=question, context=CONTEXT, top_k=3)
        for mine, yours in zip(alone["data"][0]["answers"], item["answers"], strict=True):
            assert {**mine, "score": 0} == {**yours, "score": 0}
            assert mine["score"] == pytest.approx(yours["score"], rel=1e-4)


async def test_the_impossible_answer_is_empty_and_a_low_score_abstains(
    load: Callable[..., LoadedModel], post: Callable[..., Any]
) -> None:
    load("question-answering")
    body = {"question": "Who?", "context": CONTEXT, "handle_impossible_answer": True, "top_k": 1000}
    answers = (await post("/v1/answer", **body))["data"][0]["answers"]
    assert [entry for entry in answers if entry["answer"] == ""] == [
        {"answer": "", "start": 0, "end": 0, "score": pytest.approx(0, abs=1)}
    ]
    found = (await post("/v1/answer", question="Who?", context=CONTEXT, abstain_below=0.9))["data"][0]
    assert found["answer"] is None
    assert found["abstained"]
    assert found["answers"][0]["answer"]


async def test_offsets_are_in_characters_of_the_context_as_it_was_sent(
    load: Callable[..., LoadedModel], post: Callable[..., Any]
) -> None:
    load("question-answering")
    context = "  Ünïcödé 🦙 “quotes”,\n\n the KING’s house;   in Paris\t1912 🦙🦙 end.  "
    answer = await post("/v1/answer", question="Where?", context=context, top_k=20)
    for entry in answer["data"][0]["answers"]:
        assert context[entry["start"] : entry["end"]] == entry["answer"]
        assert entry["answer"] == entry["answer"].strip()


async def test_a_question_that_fills_the_window_fails_alone(
    load: Callable[..., LoadedModel], post: Callable[..., Any], refused: Callable[..., Any]
) -> None:
    load("question-answering")
    answer = await post("/v1/answer", question=["Who?", "why " * 200], context=CONTEXT)
    assert "answers" in answer["data"][0]
    assert answer["data"][1]["error"]["code"] == "context_length_exceeded"
    error = await refused("/v1/answer", question="why " * 200, context=CONTEXT)
    assert error["param"] == "question"
    error = await refused("/v1/answer", question=["why " * 200] * 2, context=CONTEXT)
    assert error["param"] == "question.0"


@pytest.fixture
def head_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The question-answering checkpoint taken apart: an embedder whose head "answer" has the same weights."""
    source, folder = checkpoint("question-answering"), tmp_path / "encoder"
    head = folder / "heads" / "answer"
    head.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text())
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    tensors = load_file(source / "model.safetensors")
    body = {name.removeprefix("bert."): value for name, value in tensors.items() if name.startswith("bert.")}
    save_file(body, folder / "model.safetensors")
    weights = {name: tensors[f"qa_outputs.{name}"] for name in ("weight", "bias")}
    save_file(weights, head / "model.safetensors")
    (head / "config.json").write_text('{"kind": "span", "input": "tokens", "labels": [], "max_length": 96}')
    return folder


async def test_an_encoders_span_head_answers_as_a_question_answering_checkpoint(
    load: Callable[..., LoadedModel], engine: Any, post: Callable[..., Any], head_checkpoint: Path
) -> None:
    load("question-answering")
    engine.load(head_checkpoint, "encoder")
    body = {"question": "Who wrote a book?", "context": LONG, "top_k": 4, "max_seq_len": 60}
    whole = await post("/v1/answer", **body)
    assert whole["model"] == "question-answering"
    by_head = await post("/v1/answer", model="encoder", **body)
    assert [entry["answer"] for entry in by_head["data"][0]["answers"]] == [
        entry["answer"] for entry in whole["data"][0]["answers"]
    ]
    assert engine.encoded[-1].head == "answer"
    await post("/v1/answer", model="encoder", question="Who?", context=LONG)
    assert max(len(entry.ids) for entry in engine.encoded[-1].inputs) == 96


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"context": None}, "context"),
    ({"context": "  "}, "context"),
    ({"context": ["x", ""]}, "context.1"),
    ({"context": "\u0301"}, "context"),
    ({"temperature": 0.5}, "temperature"),
    ({"samples": 3}, "samples"),
    ({"stream": True}, "stream"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"doc_stride": 40, "max_seq_len": 40}, "doc_stride"),
    ({"doc_stride": -1}, "doc_stride"),
    ({"max_seq_len": 2}, "max_seq_len"),
    ({"max_answer_len": 0}, "max_answer_len"),
    ({"max_answer_len": 1.5}, "max_answer_len"),
    ({"top_k": "3"}, "top_k"),
    ({"align_to_words": "no"}, "align_to_words"),
    ({"abstain_below": -1}, "abstain_below"),
    ({"method": "generative"}, "model"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[str(number) for number in range(len(WRONG))])
async def test_a_wrong_field_is_named(
    load: Callable[..., LoadedModel], refused: Callable[..., Any], body: dict[str, Any], param: str
) -> None:
    load("question-answering")
    error = await refused("/v1/answer", **({"question": "Who?", "context": CONTEXT} | body))
    assert error["param"] == param, error
