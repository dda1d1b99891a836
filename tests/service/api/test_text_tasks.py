"""Summaries, translations and answers by LMs, over a scripted engine: prompts, maps, votes, streams, wrong requests."""

import dataclasses
import json
from typing import Any

import httpx
import pytest

from service.engine.flight import GenerateRequest
from service.engine.protocol import Loaded
from service.errors import GenerationFailed, Overloaded

LM_TASKS = ("generate", "chat", "classify", "summarize", "translate", "answer")
SENTENCES = [f"Sentence number {number} is about the letter {chr(97 + number % 26)}." for number in range(120)]
LONG = " ".join(SENTENCES)


@pytest.fixture
def engine(engine: Any) -> Any:
    """One instructed LM ("tiny", 2,048 bytes) and one without a template ("plain")."""
    for name in list(engine.models):
        if name not in ("tiny", "plain", "encoder"):
            del engine.models[name]
    for name in ("tiny", "plain"):
        model = engine.models[name]
        model.description = dataclasses.replace(model.description, tasks=LM_TASKS)
    return engine


def prompt_text(engine: Any, request: GenerateRequest) -> str:
    text: str = engine.models["tiny"].tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    return text


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events(text: str) -> list[Any]:
    data = [block.partition("data: ")[2] for block in text.strip().split("\n\n")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


# -- summaries


async def test_an_instructed_checkpoint_is_asked_by_its_template(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "  Short.  "
    answer = await post(client, "/v1/summarize", input="A long text.", style="bullets", max_sentences=2)
    (request,) = engine.requests
    prompt = prompt_text(engine, request)
    assert "<|im_start|>user" in prompt
    assert "at most 2 points" in prompt
    assert prompt.count("A long text.") == 1
    assert request.sampling.temperature == 0
    assert answer["method"] == "abstractive"
    assert answer["data"] == [{"index": 0, "summary": "- Short.", "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == len(request.prompt_ids)


async def test_a_checkpoint_without_a_template_goes_on_with_a_form_to_the_lines_end(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = " Short.\nText: more"
    answer = await post(client, "/v1/summarize", model="plain", input="A long text.")
    assert answer["data"][0]["summary"] == "Short."
    assert prompt_text(engine, engine.requests[0]).startswith("Text: A long text.")


async def test_a_text_past_the_context_is_summarized_piece_by_piece_and_every_token_counted(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = lambda request: f"Summary {len(engine.streams)}."
    answer = await post(client, "/v1/summarize", input=LONG, max_tokens=60)
    *maps, final = engine.requests
    item, usage = answer["data"][0], answer["usage"]
    assert item["pieces"] == len(maps) > 2
    assert item["summary"] == f"Summary {len(maps)}."
    prompts = [prompt_text(engine, request) for request in maps]
    for sentence in SENTENCES:
        assert sum(prompt.count(sentence) for prompt in prompts) == 1
    joined = prompt_text(engine, final)
    assert all(f"Summary {number}." in joined for number in range(len(maps)))
    assert all(len(request.prompt_ids) + request.sampling.max_tokens <= 2048 for request in engine.requests)
    texts = [f"Summary {number}." for number in range(len(maps) + 1)]
    assert usage["map_calls"] == len(maps)
    assert usage["map_prompt_tokens"] == sum(len(request.prompt_ids) for request in maps)
    assert usage["map_completion_tokens"] == sum(len(text) + 1 for text in texts[:-1])
    assert usage["prompt_tokens"] == usage["map_prompt_tokens"] + len(final.prompt_ids)
    assert usage["completion_tokens"] == sum(len(text) + 1 for text in texts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_summaries_of_pieces_that_are_too_long_together_are_summarized_again(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = lambda request: "y" * min(400, request.sampling.max_tokens - 1) + "."
    answer = await post(client, "/v1/summarize", input=LONG * 3)
    assert answer["usage"]["map_calls"] > answer["data"][0]["pieces"]
    assert len(engine.requests) == answer["usage"]["map_calls"] + 1


async def test_truncation_reads_what_fits_and_says_so(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Short."
    answer = await post(client, "/v1/summarize", input=LONG, max_tokens=60, truncate=True)
    (request,) = engine.requests
    assert SENTENCES[0] in prompt_text(engine, request)
    assert len(request.prompt_ids) == 2048 - 60
    assert answer["data"][0]["truncated"]
    assert answer["data"][0]["kept_tokens"] == len(request.prompt_ids)
    assert answer["usage"]["truncated_tokens"] == len(LONG) - sum(
        len(part) for part in prompt_text(engine, request).split("\n\n")[-1:]
    ) + len("<|im_end|>\n<|im_start|>assistant\n")


async def test_a_list_has_each_items_own_fault(client: httpx.AsyncClient, engine: Any) -> None:
    engine.fail_after, engine.failing_stream, engine.failure = 1, 1, GenerationFailed("poison")
    answer = await post(client, "/v1/summarize", input=["one", "two", "three"])
    assert [("error" in item, item["index"]) for item in answer["data"]] == [(False, 0), (True, 1), (False, 2)]
    assert answer["data"][1]["error"] == {"message": "poison", "type": "server_error", "code": "generation_failed"}


async def test_a_fault_of_all_items_is_the_requests(client: httpx.AsyncClient, engine: Any) -> None:
    engine.refusal = Overloaded("full", retry_after=1)
    response = await client.post("/v1/summarize", json={"input": ["one", "two"]})
    assert response.status_code == 429


async def test_a_fault_in_one_piece_is_the_texts_and_ends_the_other_pieces(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.fail_after, engine.failing_stream, engine.failure = 1, 1, GenerationFailed("poison")
    response = await client.post("/v1/summarize", json={"input": LONG})
    assert response.status_code == 500
    assert all(stream.outcome is not None for stream in engine.streams)


async def test_a_stream_has_the_text_in_pieces_then_reason_and_usage(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Short and wörldly."
    response = await client.post("/v1/summarize", json={"input": LONG, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert "".join(chunk["delta"] for chunk in [*chunks, last]) == "Short and wörldly."
    assert len(chunks) > 5
    assert all(chunk["finish_reason"] is None and "usage" not in chunk for chunk in chunks)
    assert last["finish_reason"] == "stop"
    assert last["usage"]["map_calls"] == last["pieces"] == len(engine.requests) - 1
    assert last["object"] == "summary.chunk"
    assert last["model_version"] == "v1"
    engine.streams.clear()
    whole = await post(client, "/v1/summarize", input=LONG)
    assert whole["usage"] == last["usage"]


async def test_a_fault_before_the_first_token_of_a_stream_has_a_status(client: httpx.AsyncClient, engine: Any) -> None:
    engine.fail_after, engine.failure = 0, GenerationFailed("poison")
    response = await client.post("/v1/summarize", json={"input": "x", "stream": True})
    assert response.status_code == 500


# -- translations


async def test_languages_are_named_to_an_instructed_checkpoint(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Bonjour."
    answer = await post(client, "/v1/translate", input=["Hello.", "Bye."], source="en", target="fr-CA")
    assert [item["translation"] for item in answer["data"]] == ["Bonjour.", "Bonjour."]
    assert (answer["source"], answer["target"]) == ("en", "fr-CA")
    assert "from English into French (as in CA)" in prompt_text(engine, engine.requests[0])


@pytest.mark.parametrize(
    ("languages", "param"), [({"target": "zz"}, "target"), ({"target": "fr", "source": "qq"}, "source"), ({}, "target")]
)
async def test_a_language_without_a_name_is_refused_with_those_there_are(
    client: httpx.AsyncClient, engine: Any, languages: dict[str, str], param: str
) -> None:
    """A model that is told to translate into zz says something, and the status was 200."""
    engine.reply = "x"
    response = await client.post("/v1/translate", json={"input": "Hello.", **languages})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "de (German)" in error["message"]


async def test_a_text_that_does_not_fit_is_translated_in_pieces_or_cut_and_said_to_be(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = lambda request: f" <{len(engine.streams)}> "
    text = " ".join(SENTENCES[:60]) + "\n\n" + " ".join(SENTENCES[60:])
    answer = await post(client, "/v1/translate", input=text, target="de")
    prompts = [prompt_text(engine, request) for request in engine.requests]
    assert [sum(prompt.count(sentence) for prompt in prompts) for sentence in SENTENCES] == [1] * len(SENTENCES)
    item = answer["data"][0]
    assert item["pieces"] == len(prompts) > 3
    assert item["translation"].split() == [f"<{number}>" for number in range(len(prompts))]
    at_break = [prompt for prompt in prompts if "\n\n" + SENTENCES[60] in prompt]
    assert ("\n\n" in item["translation"]) is not bool(at_break)
    cut = await post(client, "/v1/translate", input=[text, "short"], target="de", truncate=True)
    assert [item.get("truncated", False) for item in cut["data"]] == [True, False]


async def test_a_text_that_fits_is_still_divided_where_its_translation_would_not(
    client: httpx.AsyncClient, engine: Any
) -> None:
    """A reply has a quarter of the context at most; a text of a third of it would be translated to its middle."""
    engine.reply = "ok"
    text = " ".join(SENTENCES[:14])
    assert 2048 / 4 < len(text) < 2048 / 3
    answer = await post(client, "/v1/translate", input=text, target="de")
    assert answer["data"][0]["pieces"] == 2
    own = await post(client, "/v1/translate", input=text, target="de", max_tokens=512)
    assert "pieces" not in own["data"][0]


async def test_between_pieces_stands_what_the_language_puts_there(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "x"
    for target, joint in (("de", " "), ("zh-Hant", ""), ("jpn_Jpan", "")):
        answer = await post(client, "/v1/translate", input=LONG, target=target)
        item = answer["data"][0]
        assert item["translation"] == joint.join("x" * item["pieces"])


async def test_a_translation_in_pieces_streams_as_it_is_whole(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = lambda request: f"<{len(engine.streams)}>"
    whole = await post(client, "/v1/translate", input=LONG, target="de")
    engine.streams.clear()
    response = await client.post("/v1/translate", json={"input": LONG, "target": "de", "stream": True})
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert "".join(chunk["delta"] for chunk in [*chunks, last]) == whole["data"][0]["translation"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * len(chunks)
    assert (last["finish_reason"], last["usage"]) == ("stop", whole["usage"])
    assert last["pieces"] == whole["data"][0]["pieces"]


async def test_translations_stream(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Guten Tag."
    response = await client.post("/v1/translate", json={"input": "Hello", "target": "de", "stream": True})
    *chunks, done = events(response.text)
    assert "".join(chunk["delta"] for chunk in chunks) == "Guten Tag."
    assert {chunk["object"] for chunk in chunks} == {"translation.chunk"}
    assert done == "[DONE]"


# -- answers


async def test_a_question_is_answered_with_a_context_or_without(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Paris"
    answer = await post(client, "/v1/answer", question="Where?")
    assert answer["method"] == "generative"
    assert answer["data"] == [{"index": 0, "answer": "Paris", "finish_reason": "stop"}]
    await post(client, "/v1/answer", question="Where?", context="He lived in Paris.")
    without, within = [prompt_text(engine, request) for request in engine.requests]
    assert "Where?" in without
    assert "Text:" not in without
    assert within.index("He lived in Paris.") < within.index("Where?")


async def test_questions_and_contexts_pair_up(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "x"
    await post(client, "/v1/answer", question=["Q1", "Q2"], context=["C1", "C2"])
    await post(client, "/v1/answer", question="Q3", context=["C3", "C4"])
    await post(client, "/v1/answer", question=["Q5", "Q6"], context="C5")
    pairs = [("C1", "Q1"), ("C2", "Q2"), ("C3", "Q3"), ("C4", "Q3"), ("C5", "Q5"), ("C5", "Q6")]
    prompts = [prompt_text(engine, request) for request in engine.requests]
    assert [all(part in prompt for part in pair) for pair, prompt in zip(pairs, prompts, strict=True)] == [True] * 6


async def test_samples_are_put_to_the_vote(client: httpx.AsyncClient, engine: Any) -> None:
    replies = ["Rome", "Paris.", "the paris", "Oslo", "PARIS"]
    engine.reply = lambda request: replies[len(engine.streams)]
    answer = await post(client, "/v1/answer", question="Where?", samples=5, seed=7, abstain_below=0.5)
    item = answer["data"][0]
    assert item["answer"] == "Paris."
    assert item["confidence"] == 0.6
    assert not item["abstained"]
    assert item["votes"][0] == {"answer": "Paris.", "votes": 3}
    assert sum(entry["votes"] for entry in item["votes"]) == item["samples"] == 5
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 5
    assert len({tuple(request.prompt_ids) for request in engine.requests}) == 1
    assert engine.requests[0].sampling.temperature > 0
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_ids)
    engine.streams.clear()
    unsure = await post(client, "/v1/answer", question="Where?", samples=5, abstain_below=0.7)
    assert unsure["data"][0]["answer"] is None
    assert unsure["data"][0]["abstained"]
    assert unsure["data"][0]["confidence"] == 0.6


async def test_answers_stream(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "In Paris."
    response = await client.post("/v1/answer", json={"question": "Where?", "stream": True})
    *chunks, _ = events(response.text)
    assert "".join(chunk["delta"] for chunk in chunks) == "In Paris."


# -- wrong requests

SUMMARIZE, TRANSLATE, ANSWER = "/v1/summarize", "/v1/translate", "/v1/answer"
GOOD = {SUMMARIZE: {"input": "x"}, TRANSLATE: {"input": "x", "target": "de"}, ANSWER: {"question": "x"}}

COMMON: list[tuple[dict[str, Any], str]] = [
    ({"model": "nope"}, "model"),
    ({"model": "encoder"}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 3000}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    ({"num_beams": 0}, "num_beams"),
    ({"num_beams": 4}, "num_beams"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"early_stopping": "maybe"}, "early_stopping"),
    ({"early_stopping": True}, "early_stopping"),
    ({"early_stopping": "never"}, "early_stopping"),
    ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size"),
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": "x"}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"truncate": 1}, "truncate"),
    ({"timeout": 0}, "timeout"),
    ({"no_such_field": 1}, "no_such_field"),
]
OWN: list[tuple[str, dict[str, Any], str]] = [
    *((path, {"input": value}, param) for path in (SUMMARIZE, TRANSLATE) for value, param in [
        (5, "input"), ("", "input"), ("  ", "input"), ([], "input"), (["x", 5], "input.1"), (["x", ""], "input.1"),
        ({}, "input"), ([["x"]], "input.0"),
    ]),
    (SUMMARIZE, {"input": None}, "input"),
    (SUMMARIZE, {"method": "best"}, "method"),
    (SUMMARIZE, {"method": "extractive", "model": "tiny"}, "model"),
    (SUMMARIZE, {"style": "haiku"}, "style"),
    (SUMMARIZE, {"max_sentences": 0}, "max_sentences"),
    (SUMMARIZE, {"max_sentences": 2, "stream": True}, "max_sentences"),
    (SUMMARIZE, {"input": ["x"], "stream": True}, "stream"),
    (SUMMARIZE, {"top_k": -1}, "top_k"),
    (TRANSLATE, {"target": None}, "target"),
    (TRANSLATE, {"target": ""}, "target"),
    (TRANSLATE, {"target": "the language of love"}, "target"),
    (TRANSLATE, {"source": "{text}"}, "source"),
    (TRANSLATE, {"source": 5}, "source"),
    (TRANSLATE, {"input": ["x"], "stream": True}, "stream"),
    (ANSWER, {"question": ""}, "question"),
    (ANSWER, {"question": None}, "question"),
    (ANSWER, {"question": ["x", " "]}, "question.1"),
    (ANSWER, {"context": ""}, "context"),
    (ANSWER, {"context": ["a", "b"], "question": ["x"]}, "context"),
    (ANSWER, {"question": "x" * 5000}, "question"),
    (ANSWER, {"context": "x" * 5000}, "context"),
    (ANSWER, {"method": "extractive", "model": "tiny", "context": "x"}, "model"),
    (ANSWER, {"method": "guess"}, "method"),
    (ANSWER, {"top_k": 3}, "top_k"),
    (ANSWER, {"top_k": 0}, "top_k"),
    (ANSWER, {"handle_impossible_answer": True, "context": "x"}, "handle_impossible_answer"),
    (ANSWER, {"doc_stride": 3, "context": "x"}, "doc_stride"),
    (ANSWER, {"max_answer_len": 0}, "max_answer_len"),
    (ANSWER, {"samples": 0}, "samples"),
    (ANSWER, {"samples": 65}, "samples"),
    (ANSWER, {"samples": 2, "stream": True}, "samples"),
    (ANSWER, {"question": ["x"], "stream": True}, "stream"),
    (ANSWER, {"abstain_below": 0.5}, "abstain_below"),
    (ANSWER, {"abstain_below": 1.5}, "abstain_below"),
]  # fmt: skip
WRONG = [(path, body, param) for path in GOOD for body, param in COMMON] + OWN


@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=[f"{row[0][4:]}-{n}" for n, row in enumerate(WRONG)])
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, engine: Any, path: str, body: dict[str, Any], param: str
) -> None:
    engine.reply = "x"
    response = await client.post(path, json=GOOD[path] | body)
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["param"] == param, response.text
    assert (await client.post(path, json=GOOD[path])).status_code == 200


@pytest.mark.parametrize("path", GOOD)
async def test_what_asks_for_nothing_is_no_fault(client: httpx.AsyncClient, engine: Any, path: str) -> None:
    """A language model refused `early_stopping: false` and `no_repeat_ngram_size: 0`."""
    engine.reply = "x"
    neutral = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "no_repeat_ngram_size": 0}
    response = await client.post(path, json=GOOD[path] | neutral)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (SUMMARIZE, {"input": "x" * 60, "max_tokens": 64}, "max_tokens"),
        (TRANSLATE, {"input": "x" * 60, "target": "de", "max_tokens": 60}, "max_tokens"),
        (ANSWER, {"question": "x" * 60, "max_tokens": 1}, "question"),
        ("/v1/classify", {"input": "x" * 60, "labels": ["a", "b"]}, "input"),
    ],
)
async def test_what_the_cache_cannot_hold_is_refused_at_the_door(
    client: httpx.AsyncClient, engine: Any, path: str, body: dict[str, Any], param: str
) -> None:
    """Only completions and chat knew how much the cache holds; the others' requests failed in the worker."""
    model = engine.models["tiny"]
    model.loaded = Loaded(model=model.key, dtype="float32", device="cpu", weight_bytes=1, num_blocks=4, block_size=16)
    response = await client.post(path, json={"model": "tiny"} | body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "64" in error["message"] or "takes 63" in error["message"]
    assert all(len(request.prompt_ids) <= 64 for request in engine.requests)
