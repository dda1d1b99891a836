"""`/v1/completions` over a scripted engine: shapes, numbers, streams, stops, and clients that leave."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from model.declared_rules import DeclaredRules
from service.engine.protocol import Loaded
from service.errors import GenerationFailed, Overloaded, Unavailable

URL = "/v1/completions"


async def post(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"prompt": "Say", "max_tokens": 100} | body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events(text: str) -> list[Any]:
    """The data of server-sent events; `[DONE]` as it is."""
    found = []
    for block in text.strip().split("\n\n"):
        data = [line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: ")]
        assert len(data) == 1, block
        found.append(data[0] if data[0] == "[DONE]" else json.loads(data[0]))
    return found


async def stream(client: httpx.AsyncClient, **body: Any) -> list[Any]:
    response = await client.post(URL, json={"prompt": "Say", "max_tokens": 100, "stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


async def test_an_answer_has_the_text_the_reason_and_the_numbers(client: httpx.AsyncClient, engine: Any) -> None:
    engine.num_cached_tokens = 2
    answer = await post(client)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    choice = {"index": 0, "text": "Hello, wörld 🦙!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["choices"] == [choice]
    num_tokens = len("Hello, wörld 🦙!".encode()) + 1
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": num_tokens,
        "total_tokens": 3 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert engine.cancelled == []


async def test_the_first_able_checkpoint_answers_where_none_is_named(client: httpx.AsyncClient) -> None:
    assert (await post(client))["model"] == "tiny"
    assert (await post(client, model="plain"))["model"] == "plain"
    assert (await post(client, model="plain@v1"))["model"] == "plain"


async def test_sixteen_tokens_come_where_no_number_is_given(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "a" * 50
    answer = await post(client, max_tokens=None)
    assert answer["choices"][0]["text"] == "a" * 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
async def test_prompts_come_as_text_or_ids_alone_or_in_lists(
    client: httpx.AsyncClient, engine: Any, prompt: Any
) -> None:
    await post(client, prompt=prompt)
    expected = engine.models["tiny"].tokenizer.encode("ab") if "ab" in prompt else [97, 98]
    assert [request.prompt_ids for request in engine.requests] == [expected]


async def test_choices_are_numbered_prompt_by_prompt(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = lambda request: f"{len(request.prompt_ids)}-{len(engine.streams)}"
    answer = await post(client, prompt=["a", "bb", "ccc"], n=2)
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    assert texts == {0: "1-0", 1: "1-1", 2: "2-2", 3: "2-3", 4: "3-4", 5: "3-5"}
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 6 * 4


async def test_choices_of_one_seed_have_seeds_of_their_own(client: httpx.AsyncClient, engine: Any) -> None:
    await post(client, n=3, seed=7)
    await post(client, n=1, seed=7)
    first, second, third, alone = [request.sampling.seed for request in engine.requests]
    assert first == alone == 7
    assert len({first, second, third}) == 3


async def test_options_reach_the_engine(client: httpx.AsyncClient, engine: Any) -> None:
    options = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -1.5, "frequency_penalty": 1.25, "seed": -3, "min_tokens": 2,
    }  # fmt: skip
    await post(client, **options, logit_bias={"7": -100, "8": 1.5}, stop_token_ids=[5], priority=3, cache_salt="s")
    request = engine.requests[0]
    for name, value in options.items():
        assert getattr(request.sampling, name) == (value if name != "seed" else 2**64 - 3)
    assert request.sampling.logit_bias == {7: -100.0, 8: 1.5}
    assert request.sampling.stop_ids == (258, 5)
    assert (request.priority, request.cache_salt, request.task) == (3, "s", "generate")
    await post(client, ignore_eos=True, max_tokens=4)
    assert engine.requests[1].sampling.stop_ids == ()


@pytest.mark.parametrize(
    ("declared", "body", "expected"),
    [
        ({}, {}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        ({"do_sample": False, "temperature": 0.3, "top_k": 9}, {}, {"temperature": 0.0, "top_k": 0}),
        ({"do_sample": False}, {"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}, {}, {"temperature": 0.6, "top_k": 20}),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, {"top_p": 1}, {"top_p": 1.0, "repetition_penalty": 1.1}),
        ({"temperature": "hot", "top_k": None}, {}, {"temperature": 1.0, "top_k": 0}),
    ],
)
async def test_the_checkpoint_s_own_defaults_hold_unless_the_request_sets_them(
    client: httpx.AsyncClient, engine: Any, declared: dict[str, Any], body: dict[str, Any], expected: dict[str, float]
) -> None:
    object.__setattr__(engine.models["tiny"].description, "generation_defaults", declared)
    await post(client, **body)
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


async def test_rules_that_the_checkpoint_declares_hold_beside_those_of_the_request(
    client: httpx.AsyncClient, engine: Any
) -> None:
    rules = DeclaredRules(no_repeat_ngram_size=2, suppressed_ids=(9,), banned_sequences=((3, 4),), min_new_tokens=6)
    object.__setattr__(engine.models["tiny"].description, "declared_rules", rules)
    await post(client, max_tokens=4)
    await post(client, max_tokens=8, min_tokens=7, bad_words=["a"])
    first, second = (request.sampling for request in engine.requests)
    assert (first.min_tokens, first.no_repeat_ngram_size, first.suppressed_ids) == (4, 2, (9,))
    assert second.min_tokens == 7
    assert second.banned_sequences[0] == (3, 4)
    assert len(second.banned_sequences) > 1


async def test_a_stream_is_the_answer_in_pieces(client: httpx.AsyncClient) -> None:
    *chunks, done = await stream(client)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello, wörld 🦙!"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert len(chunks) > 10


async def test_usage_comes_last_where_it_was_asked_for(client: httpx.AsyncClient) -> None:
    *chunks, usage, done = await stream(client, stream_options={"include_usage": True}, n=2)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == (await post(client, n=2))["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["Hello, wörld 🦙!"] * 2


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("wör", "Hello, ", 11),
        (["ld", ", "], "Hello", 7),
        ("🦙", "Hello, wörld ", 18),
        (["zzz"], "Hello, wörld 🦙!", 20),
    ],
)
async def test_nothing_past_a_stop_string_goes_out(
    client: httpx.AsyncClient, engine: Any, stop: Any, text: str, num_tokens: int, streamed: bool
) -> None:
    if streamed:
        *chunks, usage, _ = await stream(client, stop=stop, stream_options={"include_usage": True})
        found, reason = "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]
    else:
        usage = await post(client, stop=stop)
        found, reason = usage["choices"][0]["text"], usage["choices"][0]["finish_reason"]
    assert (found, reason) == (text, "stop")
    assert usage["usage"]["completion_tokens"] == num_tokens
    assert engine.cancelled == ([] if stop == ["zzz"] else ["stop"])


async def test_a_stop_string_counts_after_min_tokens(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "a.b.c."
    assert (await post(client, stop=".", min_tokens=3))["choices"][0]["text"] == "a.b"


async def test_a_stop_id_is_no_part_of_the_text(client: httpx.AsyncClient, engine: Any) -> None:
    exclamation = engine.models["tiny"].tokenizer.token_id("!")
    engine.reply = "Hi! there"
    answer = await post(client, stop_token_ids=[exclamation])
    assert answer["choices"][0]["text"] == "Hi"
    assert answer["usage"]["completion_tokens"] == 3


async def test_special_tokens_show_where_that_is_asked_for(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "a<|im_start|>b"
    assert (await post(client))["choices"][0]["text"] == "ab"
    assert (await post(client, skip_special_tokens=False))["choices"][0]["text"] == "a<|im_start|>b"


@pytest.mark.parametrize("streamed", [True, False])
async def test_logprobs_lie_beside_their_tokens(client: httpx.AsyncClient, engine: Any, streamed: bool) -> None:
    engine.reply = "aé"
    if streamed:
        parts = [chunk["choices"][0]["logprobs"] for chunk in (await stream(client, logprobs=2))[:-1]]
        found = {name: [value for part in parts if part for value in part[name]] for name in parts[0]}
    else:
        found = (await post(client, logprobs=2))["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert found["text_offset"] == [0, 1, 1]
    assert [len(top) for top in found["top_logprobs"]] == [2, 2, 2]
    assert found["top_logprobs"][0]["a"] == -0.5


async def test_logprobs_of_tokens_past_a_stop_are_not_given_out(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "ab--cd"
    found = (await post(client, logprobs=0, stop="--"))["choices"][0]
    assert found["text"] == "ab"
    assert found["logprobs"]["tokens"] == ["a", "b"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_echo_begins_with_the_prompt_and_its_logprobs(
    client: httpx.AsyncClient, engine: Any, streamed: bool
) -> None:
    engine.reply = "ok"
    body: dict[str, Any] = {"prompt": ["Aé", "B"], "echo": True, "logprobs": 1}
    texts, logprobs = ["", ""], [[], []]  # type: tuple[list[str], list[list[Any]]]
    chunks = (await stream(client, **body))[:-1] if streamed else [await post(client, **body)]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        if choice["logprobs"]:
            logprobs[choice["index"]] += zip(*choice["logprobs"].values(), strict=True)
    assert texts == ["Aéok", "Bok"]
    assert [entry[0] for entry in logprobs[0]] == ["A", "bytes:\\xc3", "bytes:\\xa9", "o", "k"]
    assert [entry[1] for entry in logprobs[0]] == [None, -0.5, -0.5, -0.5, -0.5]
    assert [entry[3] for entry in logprobs[0]] == [0, 1, 1, 2, 3]
    assert [entry[3] for entry in logprobs[1]] == [0, 1, 2]


async def test_a_prompt_is_scored_without_generating(client: httpx.AsyncClient) -> None:
    answer = await post(client, echo=True, logprobs=0, max_tokens=0)
    assert answer["choices"][0]["text"] == "Say"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_long_prompt_is_cut_only_on_request_and_says_so(client: httpx.AsyncClient, engine: Any) -> None:
    answer = await post(client, prompt="abcdef", truncate_prompt_tokens=4)
    assert engine.requests[0].prompt_ids == engine.models["tiny"].tokenizer.encode("cdef")
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["truncated_prompt_tokens"] == 2
    answer = await post(client, prompt="a" * 5000, truncate_prompt_tokens=1000)
    assert answer["usage"]["truncated_prompt_tokens"] == 4000


@pytest.mark.parametrize(("prompt", "text"), [([0], " two one"), ([2, 0], " two one"), ([2], "two one")])
async def test_a_completion_goes_on_from_the_prompt_s_text_or_begins_one(
    client: httpx.AsyncClient, engine: Any, prompt: list[int], text: str
) -> None:
    engine.reply = "two one"
    answer = await post(client, model="words", prompt=prompt, max_tokens=2)
    assert answer["choices"][0]["text"] == text


async def test_a_prompt_counts_as_cached_what_its_first_choice_found(client: httpx.AsyncClient, engine: Any) -> None:
    engine.num_cached_tokens = 1
    answer = await post(client, prompt=["a", "b"], n=2)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_too_long_is_refused_with_the_numbers(client: httpx.AsyncClient, engine: Any) -> None:
    for body, param, words in (
        ({"prompt": "a" * 2048}, "prompt", "2,048"),
        ({"prompt": "a" * 2040}, "max_tokens", "2,140 (2,040 in the prompt, 100 to generate)"),
        ({"prompt": ["a", "a" * 3000]}, "prompt.1", "3,000"),
    ):
        response = await client.post(URL, json={"max_tokens": 100} | body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert words in error["message"]
        assert error["message"].startswith("This model's maximum context length is 2048 tokens. ")
    assert engine.streams == []


async def test_what_the_cache_cannot_hold_is_refused_at_the_door(client: httpx.AsyncClient, engine: Any) -> None:
    model = engine.models["tiny"]
    model.loaded = Loaded(model=model.key, dtype="float32", device="cpu", weight_bytes=1, num_blocks=4, block_size=16)
    response = await client.post(URL, json={"prompt": "a" * 60, "max_tokens": 5})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "64" in error["message"]
    await post(client, prompt="a" * 60, max_tokens=4)


async def test_what_fails_before_the_first_token_has_a_status(client: httpx.AsyncClient, engine: Any) -> None:
    engine.refusal = Overloaded("the queue is full", retry_after=3)
    for streamed in (True, False):
        response = await client.post(URL, json={"prompt": "x", "stream": streamed})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
    engine.refusal, engine.fail_after, engine.failure = None, 0, GenerationFailed("a non-finite logit")
    response = await client.post(URL, json={"prompt": "x", "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


async def test_a_fault_in_mid_stream_is_an_error_event_without_done(client: httpx.AsyncClient, engine: Any) -> None:
    engine.fail_after, engine.failure = 3, GenerationFailed("a non-finite logit")
    response = await client.post(URL, json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    assert "event: error\n" in response.text
    *chunks, error = events(response.text)
    assert len(chunks) == 3
    assert error["error"]["code"] == "generation_failed"
    assert "[DONE]" not in response.text


@pytest.mark.usefixtures("impatient")
async def test_a_stream_that_waits_for_its_first_token_gives_signs_of_life(base_url: str, engine: Any) -> None:
    engine.hold_after = 0
    async with (
        httpx.AsyncClient(base_url=base_url) as client,
        client.stream("POST", URL, json={"prompt": "x", "max_tokens": 100, "stream": True}) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        engine.released.set()
        rest = [line async for line in lines if line]
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in rest if line.startswith("data: {"))
    assert (text, rest[-1]) == ("Hello, wörld 🦙!", "data: [DONE]")


@pytest.mark.usefixtures("impatient")
async def test_what_fails_after_a_sign_of_life_is_an_error_event(base_url: str, engine: Any) -> None:
    engine.hold_after, engine.fail_after, engine.failure = 0, 1, Unavailable("the worker is gone")
    async with (
        httpx.AsyncClient(base_url=base_url) as client,
        client.stream("POST", URL, json={"prompt": "x", "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        engine.released.set()
        rest = [line async for line in lines if line]
    assert "event: error" in rest
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "unavailable"


@pytest.mark.usefixtures("impatient")
async def test_what_is_no_stream_waits_in_silence(base_url: str, engine: Any) -> None:
    engine.hold_after = 0
    async with httpx.AsyncClient(base_url=base_url) as client:
        request = asyncio.create_task(client.post(URL, json={"prompt": "x", "max_tokens": 100}))
        await engine.until(lambda: bool(engine.streams))
        engine.released.set()
        assert (await request).json()["choices"][0]["text"] == "Hello, wörld 🦙!"


async def test_when_one_of_several_is_not_accepted_none_runs_on(client: httpx.AsyncClient, engine: Any) -> None:
    def reply(request: Any) -> str:
        if len(engine.streams) == 2:
            raise Overloaded("full")
        return "x"

    engine.reply = reply
    response = await client.post(URL, json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429
    assert engine.cancelled == ["cancelled", "cancelled"]


async def test_when_one_of_several_fails_the_others_are_cancelled(client: httpx.AsyncClient, engine: Any) -> None:
    engine.fail_after, engine.failing_stream, engine.hold_after = 2, 1, 2
    response = await client.post(URL, json={"prompt": "a", "n": 3})
    assert response.status_code == 500
    assert len(engine.cancelled) == 2


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_a_stream_cancels_it(base_url: str, engine: Any, n: int) -> None:
    engine.hold_after = 4
    async with httpx.AsyncClient(base_url=base_url) as client:
        body = {"prompt": "x", "stream": True, "n": n}
        async with client.stream("POST", URL, json=body) as response:
            await anext(response.aiter_lines())
    await engine.until(lambda: len(engine.cancelled) == n)
    assert engine.cancelled == ["cancelled"] * n


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_before_the_first_token_cancels_its_request(
    base_url: str, engine: Any, streamed: bool
) -> None:
    engine.hold_after = 0
    async with httpx.AsyncClient(base_url=base_url) as client:
        request = asyncio.create_task(client.post(URL, json={"prompt": "x", "stream": streamed, "n": 2}))
        await engine.until(lambda: len(engine.streams) == 2)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await engine.until(lambda: engine.cancelled == ["cancelled", "cancelled"])


async def test_chunks_go_out_while_the_text_is_made(base_url: str, engine: Any) -> None:
    engine.hold_after = 4
    async with (
        httpx.AsyncClient(base_url=base_url) as client,
        client.stream("POST", URL, json={"prompt": "x", "stream": True}) as response,
    ):
        lines, text = response.aiter_lines(), ""
        async for line in lines:
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if text == "Hell":
                break
        engine.released.set()
        assert [line async for line in lines][-2] == "data: [DONE]"


async def test_the_access_line_has_what_happened(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, engine: Any
) -> None:
    engine.num_cached_tokens = 1
    with caplog.at_level("INFO", logger="service.access"):
        await post(client, n=2)
    line = caplog.records[-1]
    assert (line.model, line.task, line.prompt_tokens, line.output_tokens) == ("tiny@v1", "generate", 3, 40)  # type: ignore[attr-defined]
    assert (line.cached_tokens, line.finish_reason) == (1, "stop")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("body", "header", "seconds"), [({"timeout": 5}, "20", 5), ({}, "7.5", 7.5), ({}, None, 600)])
async def test_the_soonest_deadline_holds(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], header: str | None, seconds: float
) -> None:
    headers = {} if header is None else {"X-Request-Timeout": header}
    response = await client.post(URL, json={"prompt": "x"} | body, headers=headers)
    assert response.status_code == 200
    accepted = engine.streams[0].timings.accepted
    assert engine.requests[0].deadline == pytest.approx(accepted + seconds, abs=2.0)
