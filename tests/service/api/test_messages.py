"""`/v1/messages`: the prompts that conversations become, replies as blocks and as events, over a scripted engine."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from service.errors import GenerationFailed

URL, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "How it is outside", "input_schema": CITY}
CHAT_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "How it is outside", "parameters": CITY},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
THOUGHT = "<think>\nA greeting.\n</think>\n\n"
USE = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Bern"}}
CHAT_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


def text(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def result(content: Any = "rain", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "call_1", "content": content, **more}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_1", "content": content}


def body(content: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 100, "messages": [user(content)], **fields}


async def post(client: httpx.AsyncClient, url: str, body: Any) -> dict[str, Any]:
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def message(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    return await post(client, URL, body(**fields))


def events(stream: str) -> list[dict[str, Any]]:
    """What the events say; each has its type as its name."""
    found = []
    for event in stream.removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\ndata: ")
        found.append(json.loads(data))
        assert name == f"event: {found[-1]['type']}"
    return found


# Prompts

CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SIGNED = {"type": "thinking", "thinking": "Rain, perhaps.", "signature": "x"}
CONVERSATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a text": ({}, {}),
    "a system prompt": (
        {"system": "Be kind."},
        {"messages": [{"role": "system", "content": "Be kind."}, user("Hello")]},
    ),
    "a system prompt in blocks": (
        {"system": [text("Be kind.", **CACHED), text("Be brief.")]},
        {"messages": [{"role": "system", "content": "Be kind.\nBe brief."}, user("Hello")]},
    ),
    "an empty system prompt": ({"system": []}, {}),
    "a system message": (
        {"messages": [user("Hello"), {"role": "system", "content": "Be kind."}]},
        {"messages": [user("Hello"), {"role": "system", "content": "Be kind."}]},
    ),
    "blocks": (
        {"messages": [user([text("One"), text("Two", **CACHED, citations=[])])]},
        {"messages": [user([text("One"), text("Two")])]},
    ),
    "turns": (
        {"messages": [user("One"), assistant("Two"), user("Three")]},
        {"messages": [user("One"), assistant("Two"), user("Three")]},
    ),
    "a turn in two messages": (
        {"messages": [user("One"), user([text("Two")])]},
        {"messages": [user("One\nTwo")]},
    ),
    "a reply begun": (
        {"messages": [user("One"), assistant("It is")]},
        {"messages": [user("One"), assistant("It is")], "continue_final_message": True},
    ),
    "tools": ({"tools": [TOOL | CACHED]}, {"tools": [CHAT_TOOL]}),
    "tools that must not be called": ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {}),
    "a call and its result": (
        {
            "tools": [TOOL],
            "messages": [
                user("Rain?"),
                assistant([text("I look."), USE | {"caller": {"type": "direct"}}]),
                user([result(), text("Well?")]),
            ],
        },
        {
            "tools": [CHAT_TOOL],
            "messages": [user("Rain?"), assistant("I look.", tool_calls=[CHAT_CALL]), tool("rain"), user("Well?")],
        },
    ),
    "a call alone, and a result in blocks": (
        {
            "tools": [TOOL],
            "messages": [user("Rain?"), assistant([USE]), user([result([text("rain"), text("wind")], **CACHED)])],
        },
        {
            "tools": [CHAT_TOOL],
            "messages": [user("Rain?"), assistant(None, tool_calls=[CHAT_CALL]), tool("rain\nwind")],
        },
    ),
    "a call that failed": (
        {"tools": [TOOL], "messages": [user("Rain?"), assistant([USE]), user([result("no net", is_error=True)])]},
        {
            "tools": [CHAT_TOOL],
            "messages": [user("Rain?"), assistant(None, tool_calls=[CHAT_CALL]), tool("Error: no net")],
        },
    ),
    "thoughts": (
        {
            "model": "thinker",
            "tools": [TOOL],
            "messages": [user("Rain?"), assistant([SIGNED, text("I look."), USE]), user([result()])],
        },
        {
            "model": "thinker",
            "tools": [CHAT_TOOL],
            "messages": [
                user("Rain?"),
                assistant("I look.", reasoning_content="Rain, perhaps.", tool_calls=[CHAT_CALL]),
                tool("rain"),
            ],
        },
    ),
    "thoughts that nobody can read": (
        {"messages": [user("Hi"), assistant([{"type": "redacted_thinking", "data": "x"}, text("Yes?")]), user("So")]},
        {"messages": [user("Hi"), assistant("Yes?"), user("So")]},
    ),
    "thinking disabled": (
        {"model": "thinker", "thinking": {"type": "disabled"}},
        {"model": "thinker", "reasoning_effort": "none"},
    ),
    "thinking enabled": (
        {"model": "thinker", "thinking": {"type": "enabled", "budget_tokens": 50}},
        {"model": "thinker", "reasoning_effort": "low"},
    ),
    "thinking as the model likes": ({"model": "thinker", "thinking": {"type": "adaptive"}}, {"model": "thinker"}),
    "an effort": (
        {"model": "thinker", "output_config": {"effort": "max"}},
        {"model": "thinker", "reasoning_effort": "xhigh"},
    ),
    "no thoughts of a model that has none": ({"thinking": {"type": "disabled"}}, {}),
    "variables": (
        {"model": "thinker", "chat_template_kwargs": {"enable_thinking": False}},
        {"model": "thinker", "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "calls by Llama": (
        {
            "model": "llama",
            "tools": [TOOL],
            "messages": [user("Rain?"), assistant([USE]), user([result()])],
        },
        {
            "model": "llama",
            "tools": [CHAT_TOOL],
            "messages": [user("Rain?"), assistant(None, tool_calls=[CHAT_CALL]), tool("rain")],
        },
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_a_conversation_makes_the_same_prompt_as_by_chat_completions_and_is_counted_so(
    client: httpx.AsyncClient, engine: Any, name: str
) -> None:
    ours, theirs = CONVERSATIONS[name]
    await message(client, **ours)
    await post(client, CHAT, {"model": "tiny", "messages": [user("Hello")], "max_tokens": 100, **theirs})
    messages, chat = engine.requests
    assert messages.prompt_ids == chat.prompt_ids
    assert replace(messages.sampling, seed=0) == replace(chat.sampling, seed=0)
    counted = {key: value for key, value in body(**ours).items() if key != "max_tokens"}
    assert await post(client, COUNT, counted) == {"input_tokens": len(chat.prompt_ids)}
    assert len(engine.requests) == 2


async def test_what_is_sampled_is_what_was_asked_for(client: httpx.AsyncClient, engine: Any) -> None:
    await message(
        client, temperature=0.5, top_p=0.9, top_k=7, seed=5, service_tier="auto", metadata={"user_id": "u"},
        cache_control={"type": "ephemeral"}, stop_sequences=["x"], max_tokens=31, cache_salt="s", priority=-1,
    )  # fmt: skip
    request = engine.requests[0]
    sampling = request.sampling
    found = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, sampling.max_tokens)
    assert found == (0.5, 0.9, 7, 5, 31)
    assert (request.cache_salt, request.priority) == ("s", -1)


@pytest.mark.parametrize(
    ("choice", "theirs"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
async def test_a_tool_is_chosen_as_by_chat_completions(
    client: httpx.AsyncClient, engine: Any, choice: dict[str, Any], theirs: Any, alone: bool
) -> None:
    engine.reply = f"{CALL}\n{CALL}"
    choice = {**choice, "disable_parallel_tool_use": alone}
    answer = await message(client, tools=[TOOL | {"strict": True}], tool_choice=choice, max_tokens=200)
    strict = {"type": "function", "function": {**CHAT_TOOL["function"], "strict": True}}  # type: ignore[dict-item]
    chat = {"tool_choice": theirs, "parallel_tool_calls": not alone, "tools": [strict]}
    await post(client, CHAT, {"model": "tiny", "messages": [user("Hello")], **chat})
    assert engine.requests[0].sampling.grammar == engine.requests[1].sampling.grammar
    assert engine.requests[0].sampling.grammar.kind == "lark"
    assert len(answer["content"]) == (1 if alone or "name" in choice else 2)


async def test_an_output_is_held_to_its_schema(client: httpx.AsyncClient, engine: Any) -> None:
    await message(client, output_config={"format": {"type": "json_schema", "schema": CITY}})
    assert engine.requests[0].sampling.grammar.kind == "json_schema"


# Replies


async def test_a_text_is_a_block(client: httpx.AsyncClient, engine: Any) -> None:
    engine.num_cached_tokens = 3
    answer = await message(client)
    assert answer.pop("id").startswith("msg")
    num_tokens = len(engine.requests[0].prompt_ids)
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [text("Hello, wörld 🦙!")],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_tokens - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 20,
        },
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "reply", "reason", "sequence"),
    [
        ({}, "Hello", "end_turn", None),
        ({"max_tokens": 3}, "Hello", "max_tokens", None),
        ({"stop_sequences": ["zz", "ll"]}, "Hello", "stop_sequence", "ll"),
        ({"stop_sequences": ["lo", "hello"]}, "Hello", "stop_sequence", "lo"),
        ({"stop_sequences": ["lot"]}, "Hello", "end_turn", None),
        ({"tools": [TOOL]}, CALL, "tool_use", None),
        ({"tools": [TOOL], "max_tokens": 45}, CALL, "max_tokens", None),
        ({"tools": [TOOL], "stop_sequences": ["rich"]}, CALL, "stop_sequence", "rich"),
        ({}, "", "end_turn", None),
    ],
)
async def test_why_it_ended_is_told(
    client: httpx.AsyncClient, engine: Any, fields: Any, reply: str, reason: str, sequence: str | None, streamed: bool
) -> None:
    engine.reply = reply
    asked = body(**fields, stream=streamed)
    response = await client.post(URL, json=asked)
    told = events(response.text)[-2]["delta"] if streamed else response.json()
    assert (told["stop_reason"], told["stop_sequence"]) == (reason, sequence)


async def test_a_call_that_was_cut_off_has_the_input_that_came(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = CALL.replace('"city"', '"days": 3, "city"')
    answer = await message(client, tools=[TOOL], max_tokens=50)
    assert [block["input"] for block in answer["content"]] == [{"days": 3}]


@pytest.mark.parametrize("arguments", ['"Bern"', '"[1]"'])
async def test_arguments_that_are_no_object_make_no_input(
    client: httpx.AsyncClient, engine: Any, arguments: str
) -> None:
    engine.reply = CALL.replace('{"city": "Zürich"}', arguments)
    answer = await message(client, tools=[TOOL])
    assert answer["content"][0]["input"] == {}


REPLIES = [
    "Hello, wörld 🦙!",
    f"{THOUGHT}Hello",
    CALL,
    f"First: {CALL}\n{CALL}",
    f"{THOUGHT}So: {CALL}",
    THOUGHT,
    "",
]


@pytest.mark.parametrize("model", ["tiny", "thinker"])
@pytest.mark.parametrize("reply", REPLIES)
async def test_a_stream_builds_up_what_the_whole_message_is(
    client: httpx.AsyncClient, engine: Any, model: str, reply: str
) -> None:
    engine.reply = reply
    asked = body(model=model, tools=[TOOL], max_tokens=500)
    whole = await post(client, URL, asked)
    response = await client.post(URL, json=asked | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    built = put_together(events(response.text))
    ids = {"id", "usage"}  # the scripted engine finds more in its cache the second time
    for block, told in zip(built["content"], whole["content"], strict=True):
        assert without(block, ids) == without(told, ids)
    assert built["stop_reason"] == whole["stop_reason"]
    assert sum(built["usage"].values()) == sum(whole["usage"].values())


def without(value: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if key not in names}


def put_together(told: list[dict[str, Any]]) -> dict[str, Any]:
    """As a client would; checks the order of the events on the way."""
    assert [event["type"] for event in told[:3]] == ["message_start", "content_block_start", "ping"]
    assert told[-1] == {"type": "message_stop"}
    message: dict[str, Any] = told[0]["message"]
    is_open, arguments = False, ""
    for event in told[1:-2]:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert (is_open, index) == (False, len(message["content"]))
                message["content"].append(block)
                is_open, arguments = True, ""
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert (is_open, index) == (True, len(message["content"]) - 1)
                block, (kind, value) = message["content"][-1], list(delta.items())[1]
                if kind == "partial_json":
                    arguments += value
                else:
                    block[kind] += value
            case {"type": "content_block_stop", "index": index}:
                assert (is_open, index) == (True, len(message["content"]) - 1)
                is_open = False
                if arguments:
                    message["content"][-1]["input"] = json.loads(arguments)
            case _:
                assert event == {"type": "ping"}
    assert not is_open
    return message | told[-2]["delta"] | {"usage": told[-2]["usage"]}


async def test_a_stream_is_these_events_to_the_letter(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Hi"
    response = await client.post(URL, json=body(stream=True))
    start, _, rest = response.text.partition("\n\n")
    head = json.loads(start.removeprefix("event: message_start\ndata: "))
    assert head["message"]["content"] == []
    assert head["message"]["stop_reason"] is None
    num_tokens = head["message"]["usage"]["input_tokens"]
    assert rest == (
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}\n\n'
        'event: ping\ndata: {"type":"ping"}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"H"}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"i"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        f'"usage":{{"input_tokens":{num_tokens},"cache_creation_input_tokens":0,"cache_read_input_tokens":0,'
        '"output_tokens":3}}\n\n'
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


async def test_a_fault_in_mid_stream_is_the_last_event(client: httpx.AsyncClient, engine: Any) -> None:
    engine.fail_after, engine.failure = 3, GenerationFailed("a number is not finite")
    response = await client.post(URL, json=body(stream=True))
    last = events(response.text)[-1]
    assert last["error"] == {"type": "api_error", "message": "a number is not finite"}
    assert last["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_frees_what_it_asked_for(base_url: str, engine: Any, streamed: bool) -> None:
    engine.hold_after = 4 if streamed else 0
    async with httpx.AsyncClient(base_url=base_url) as client:
        if streamed:
            async with client.stream("POST", URL, json=body(stream=True)) as response:
                await anext(response.aiter_lines())
        else:
            request = asyncio.create_task(client.post(URL, json=body()))
            await engine.until(lambda: len(engine.streams) == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
    await engine.until(lambda: engine.cancelled == ["cancelled"])
