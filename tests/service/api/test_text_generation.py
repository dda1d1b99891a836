"""`/generate`, `/generate_stream` and `/hf/text-generation`, as the real `InferenceClient` sends and reads them."""

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import TextGenerationError

from model.batch import TokenLogprobs
from service.api.text_generation import GenerateBody, GenerateWriter
from service.tasks.generation import Delta

REPLY = "Hello, wörld 🦙!"
NUM_BYTES = len(REPLY.encode())
END = {"id": 258, "text": "<|im_end|>", "special": True}


@pytest.fixture
async def hub(base_url: str) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(model=f"{base_url}/hf/text-generation") as client:
        yield client


async def test_the_text_alone_and_with_the_prompt_before_it(hub: AsyncInferenceClient, engine: Any) -> None:
    assert await hub.text_generation("Say hello") == REPLY
    assert await hub.text_generation("Say hello", return_full_text=True) == "Say hello" + REPLY
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (100, 0.0)


async def test_details_have_every_token_and_the_end(hub: AsyncInferenceClient) -> None:
    found = await hub.text_generation("Hi!", details=True, decoder_input_details=True, seed=7, top_n_tokens=2)
    details = found.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("eos_token", NUM_BYTES + 1, 7)
    assert "".join(token.text for token in details.tokens if not token.special) == found.generated_text == REPLY
    assert [token.id for token in details.tokens][-1] == END["id"]
    assert (details.tokens[-1].text, details.tokens[-1].special) == (END["text"], True)
    assert [token.logprob for token in details.tokens] == [-0.5] * (NUM_BYTES + 1)
    assert [(token.text, token.logprob) for token in details.prefill] == [("H", None), ("i", -0.5), ("!", -0.5)]
    assert details.top_tokens is not None
    assert [[token["logprob"] for token in row] for row in details.top_tokens] == [[-0.5, -1.5]] * (NUM_BYTES + 1)


@pytest.mark.parametrize(("asked", "prefill"), [(True, [("H", None)]), (False, [])])
async def test_a_prompt_of_one_token_is_told_as_longer_ones_are(
    hub: AsyncInferenceClient, asked: bool, prefill: list[tuple[str, float | None]]
) -> None:
    """Nothing predicts its only token, and so no value of it came: it was left out."""
    found = await hub.text_generation("H", details=True, decoder_input_details=asked)
    assert found.details is not None
    assert [(token.text, token.logprob) for token in found.details.prefill] == prefill


async def test_a_stream_has_an_event_for_each_token_and_the_whole_in_the_last(hub: AsyncInferenceClient) -> None:
    events = [event async for event in await hub.text_generation("Hi!", details=True, stream=True)]
    assert [event.index for event in events] == list(range(1, NUM_BYTES + 2))
    assert "".join(event.token.text for event in events if not event.token.special) == REPLY
    assert [event.generated_text for event in events] == [None] * NUM_BYTES + [REPLY]
    last = events[-1].details
    assert last is not None
    assert (last.finish_reason, last.generated_tokens, last.input_length) == ("eos_token", NUM_BYTES + 1, 3)
    pieces = [piece async for piece in await hub.text_generation("Hi!", stream=True, max_new_tokens=5)]
    assert pieces == ["H", "e", "l", "l", "o"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_part_of_the_text_and_the_reason(hub: AsyncInferenceClient, stream: bool) -> None:
    found: Any = await hub.text_generation("Hi!", details=True, stop=["lo, w"], stream=stream)
    if stream:
        events = [event async for event in found]
        assert "".join(event.token.text for event in events) == "Hello, w"
        found = events[-1]
    assert (found.generated_text, found.details.finish_reason) == ("Hello, w", "stop_sequence")
    cut: Any = await hub.text_generation("Hi!", details=True, max_new_tokens=3, stream=False)
    assert (cut.generated_text, cut.details.finish_reason) == ("Hel", "length")


@pytest.mark.parametrize(
    ("given", "temperature", "top_k"),
    [({}, 0.0, 0), ({"do_sample": True}, 1.0, 0), ({"temperature": 0.5}, 0.5, 0), ({"top_k": 5}, 1.0, 5),
     ({"do_sample": False, "top_p": 0.9}, 1.0, 0)],
)  # fmt: skip
async def test_what_is_not_sampled_is_greedy(
    hub: AsyncInferenceClient, engine: Any, given: dict[str, Any], temperature: float, top_k: int
) -> None:
    await hub.text_generation("Hi!", **given)
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.top_k) == (temperature, top_k)


async def test_grammars_and_cuts_go_their_way(hub: AsyncInferenceClient, engine: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for kind, value in (("json", schema), ("regex", "a+")):
        await hub.text_generation("Hi!", grammar={"type": kind, "value": value}, truncate=2)  # type: ignore[arg-type]
    grammars = [request.sampling.grammar for request in engine.requests]
    assert [grammar.kind for grammar in grammars if grammar is not None] == ["json_schema", "regex"]
    assert [len(request.prompt_ids) for request in engine.requests] == [2, 2]


async def test_the_servers_own_addresses_answer_whole_and_as_a_stream(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"inputs": "Hi!", "parameters": {"max_new_tokens": 2}}
    assert (await client.post("/generate?model=llama", json=body)).json() == {"generated_text": "He"}
    assert engine.requests[-1].model.startswith("llama")
    response = await client.post("/generate_stream", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data:")) for line in response.text.split("\n") if line]
    assert events == [
        {"index": 1, "token": {"id": 72 - 33, "text": "H", "logprob": -0.5, "special": False},
         "generated_text": None, "details": None},
        {"index": 2, "token": {"id": 101 - 33, "text": "e", "logprob": -0.5, "special": False},
         "generated_text": "He", "details": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": ["a"]}, "inputs"),
        ({"inputs": "a" * 5000}, "inputs"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 5000}}, "parameters.max_new_tokens"),
        ({"inputs": "a", "parameters": {"temperature": -1}}, "parameters.temperature"),
        ({"inputs": "a", "parameters": {"stop": [""]}}, "parameters.stop.0"),
        ({"inputs": "a", "parameters": {"seed": -1}}, "parameters.seed"),
        ({"inputs": "a", "parameters": {"typical_p": 0.9}}, "parameters.typical_p"),
        ({"inputs": "a", "parameters": {"adapter_id": "x"}}, "parameters.adapter_id"),
        ({"inputs": "a", "parameters": {"watermark": True}}, "parameters.watermark"),
        ({"inputs": "a", "parameters": {"best_of": 2}}, "parameters.best_of"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "("}}}, "parameters.grammar.value"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "json", "value": {"type": 5}}}},
         "parameters.grammar.value"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "lark", "value": "x"}}}, "parameters.grammar.type"),
        ({"inputs": "a", "stream": True, "parameters": {"details": True, "decoder_input_details": True}},
         "parameters.decoder_input_details"),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_named_by_the_name_that_it_has_here(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await client.post("/hf/text-generation", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["message"].count("guided_json") == error["message"].count("prompt_logprobs") == 0


def test_an_end_that_comes_after_the_last_token_is_told_all_the_same(engine: Any) -> None:
    """As it does where the worker died between the two."""
    prompt, usage = SimpleNamespace(ids=[39]), SimpleNamespace(prompt_tokens=1, completion_tokens=1)
    generation: Any = SimpleNamespace(model=engine.resolve("tiny", "generate"), prompts=[prompt], usage=usage)
    writer = GenerateWriter(GenerateBody(inputs="H", stream=True), generation)
    writer.chunk(Delta(0, text="e", tokens=[TokenLogprobs(68, -0.5, (), ())], offsets=[0]))
    event = json.loads(writer.chunk(Delta(0, text="?", finish_reason="length")).removeprefix(b"data:"))
    assert (event["index"], event["token"]["text"], event["generated_text"]) == (1, "?", "e?")


async def test_whoever_leaves_a_stream_ends_its_generation(base_url: str, engine: Any) -> None:
    engine.hold_after = 3
    async with (
        httpx.AsyncClient(base_url=base_url) as client,
        client.stream("POST", "/generate_stream", json={"inputs": "Hi!"}) as response,
    ):
        assert (await anext(response.aiter_lines())).startswith("data:")
    await engine.until(lambda: bool(engine.cancelled))


async def test_a_fault_in_mid_stream_is_raised_by_the_client(hub: AsyncInferenceClient, engine: Any) -> None:
    engine.fail_after = 2
    pieces = await hub.text_generation("Hi!", stream=True)
    assert [await anext(pieces), await anext(pieces)] == ["H", "e"]
    with pytest.raises(TextGenerationError, match="the step failed"):
        await anext(pieces)
