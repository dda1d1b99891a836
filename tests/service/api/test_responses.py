"""`/v1/responses`: the official client's own types and streams, over a scripted engine; stateless, told in items."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError
from pydantic import BaseModel

from service.api.schemas_chat import MAX_MESSAGES
from service.errors import GenerationFailed

URL = "/v1/responses"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
THOUGHT = "<think>\nA greeting.\n</think>\n\nHello, wörld 🦙!"


class City(BaseModel):
    city: str


@pytest.fixture
async def openai(base_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_text(engine: Any, number: int = -1) -> str:
    request = engine.requests[number]
    text: str = engine.models["tiny"].tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    return text


async def test_a_text_is_answered_by_a_message(openai: AsyncOpenAI, engine: Any) -> None:
    engine.num_cached_tokens = 3
    answer = await openai.responses.create(
        model="tiny", input="Hello", instructions="Be kind.", max_output_tokens=50, temperature=0.5, metadata={"a": "b"}
    )
    assert answer.output_text == "Hello, wörld 🦙!"
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "tiny")
    assert answer.id.startswith("resp-")
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(engine.requests[0].prompt_ids)
    assert answer.usage.input_tokens_details.cached_tokens == 3
    assert answer.usage.output_tokens == 20
    assert (answer.instructions, answer.temperature, answer.metadata) == ("Be kind.", 0.5, {"a": "b"})
    assert engine.requests[0].sampling.max_tokens == 50
    assert prompt_text(engine) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_what_was_cut_off_is_incomplete_and_says_why(openai: AsyncOpenAI) -> None:
    answer = await openai.responses.create(model="tiny", input="Hello", max_output_tokens=5)
    assert (answer.status, answer.output_text) == ("incomplete", "Hello")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in answer.output] == ["incomplete"]  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["tiny", "thinker"])
@pytest.mark.parametrize("reply", ["Hello, wörld 🦙!", THOUGHT, CALL, "First: " + CALL + "\n" + CALL, ""])
async def test_a_stream_builds_up_what_the_whole_answer_is(
    openai: AsyncOpenAI, engine: Any, model: str, reply: str
) -> None:
    engine.reply = reply
    options: Any = {"model": model, "input": "Hello", "tools": TOOLS, "max_output_tokens": 300}
    whole = await openai.responses.create(**options)
    events = [event async for event in await openai.responses.create(**options, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last: Any = events[-1]
    assert last.type == "response.completed"
    assert shape(last.response.output) == shape(whole.output)
    counts = {"input_tokens_details"}  # the scripted engine finds more in its cache the second time
    assert last.response.usage.model_dump(exclude=counts) == whole.usage.model_dump(exclude=counts)
    told = [event.item for event in events if event.type == "response.output_item.done"]
    assert told == last.response.output
    for index, item in enumerate(last.response.output):
        deltas = [e.delta for e in events if e.type.endswith(".delta") and e.output_index == index]  # type: ignore[union-attr]
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(deltas) == text


def shape(items: list[Any]) -> list[dict[str, Any]]:
    """Items without what is made up for each answer."""
    return [item.model_dump(exclude={"id", "call_id"}) for item in items]


async def test_the_client_s_own_stream_puts_it_together(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = THOUGHT
    async with openai.responses.stream(model="thinker", input="Hello") as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == "Hello, wörld 🦙!"
    assert [item.type for item in final.output] == ["reasoning", "message"]


async def test_what_is_thought_is_an_item_of_its_own_and_is_counted(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = THOUGHT
    answer = await openai.responses.create(model="thinker", input="Hello")
    reasoning: Any = answer.output[0]
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "A greeting.")
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == len("<think>\nA greeting.")


async def test_a_call_and_its_result_go_back_and_forth(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = THOUGHT.replace("Hello, wörld 🦙!", CALL)
    conversation: list[Any] = [{"role": "user", "content": "Rain?"}]
    answer = await openai.responses.create(model="thinker", input=conversation, tools=TOOLS)
    call: Any = answer.output[1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Zürich"})
    engine.reply = "Yes."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    conversation += [*answer.output, result]
    again = await openai.responses.create(model="thinker", input=conversation, tools=TOOLS)
    assert again.output_text == "Yes."
    text = prompt_text(engine)
    assert '"city": "Zürich"' in text
    assert "<tool_response>\nrain\n</tool_response>" in text
    assert text.count("<|im_start|>assistant") == 2
    await openai.responses.create(
        model="thinker", input=[*conversation, *again.output, {"role": "user", "content": "?"}]
    )


async def test_a_tool_is_forced_and_formats_are_held_to(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = CALL
    await openai.responses.create(
        model="tiny", input="x", tools=TOOLS, tool_choice={"type": "function", "name": "weather"}
    )
    assert engine.requests[-1].sampling.grammar.kind == "lark"
    engine.reply = '{"city": "Bern"}'
    parsed = await openai.responses.parse(model="tiny", input="x", text_format=City)
    assert parsed.output_parsed == City(city="Bern")
    assert engine.requests[-1].sampling.grammar.kind == "json_schema"
    await openai.responses.create(model="tiny", input="x", text={"format": {"type": "json_object"}})
    assert engine.requests[-1].sampling.grammar.kind == "json_object"


async def test_logprobs_come_with_the_text(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = "aé"
    answer = await openai.responses.create(
        model="tiny", input="x", include=["message.output_text.logprobs"], top_logprobs=2
    )
    found: Any = answer.output[0].content[0].logprobs  # type: ignore[union-attr,index]
    assert [entry.bytes for entry in found] == [[97], [0xC3], [0xA9]]
    assert all(len(entry.top_logprobs) == 2 for entry in found)


@pytest.mark.parametrize("streamed", [False, True])
async def test_logprobs_wait_for_the_text_that_they_belong_to(openai: AsyncOpenAI, engine: Any, streamed: bool) -> None:
    """A delta without text made an empty message of its token: before a call, within one (and failed then), between
    thoughts."""
    engine.reply = f"<think>\na\n\nb\n</think>\n\nOn.\n{CALL}"
    options: Any = {"model": "special-thinker", "input": "x", "tools": TOOLS, "top_logprobs": 1}
    if streamed:
        events = [event async for event in await openai.responses.create(**options, stream=True)]
        output = events[-1].response.output  # type: ignore[union-attr]
        assert [e.item for e in events if e.type == "response.output_item.done"] == output
    else:
        output = (await openai.responses.create(**options)).output
    reasoning, message, call = output
    assert reasoning.content[0].text == "a\n\nb"
    assert [entry.token for entry in message.content[0].logprobs] == ["O", "n", "."]
    assert (call.status, json.loads(call.arguments)) == ("completed", {"city": "Zürich"})


async def test_tokens_without_text_are_told_at_the_end_of_the_message(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = "ab<|endoftext|>"
    answer = await openai.responses.create(model="tiny", input="x", top_logprobs=1)
    part: Any = answer.output[0].content[0]  # type: ignore[union-attr,index]
    assert (part.text, [entry.token for entry in part.logprobs]) == ("ab", ["a", "b", "<|endoftext|>"])


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_without_a_name_that_can_be_read_is_text(
    client: httpx.AsyncClient, engine: Any, streamed: bool
) -> None:
    """The name was read as JSON without care: 500, or a stream that broke off."""
    engine.reply = '<tool_call>{"name": "a\\q", "arguments": {}}'
    response = await client.post(URL, json={"input": "x", "tools": TOOLS, "stream": streamed})
    assert response.status_code == 200
    data = response.text.rpartition("data: ")[2] if streamed else response.text
    answer = json.loads(data)["response"] if streamed else json.loads(data)
    assert answer["output"][0]["content"][0]["text"] == engine.reply


async def test_as_many_items_as_fit_and_instructions_are_one_message_too_many(client: httpx.AsyncClient) -> None:
    """It was pydantic's own error, and a 500."""
    items = [{"role": "user", "content": "x"}] * MAX_MESSAGES
    response = await client.post(URL, json={"input": items, "instructions": "Be kind."})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "input"
    assert error["message"] == "input and instructions make 4,097 messages; the limit is 4,096"


async def test_a_fault_in_a_message_is_told_in_the_caller_s_words(client: httpx.AsyncClient) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "noon"}
    error = (await client.post(URL, json={"input": [{"role": "user", "content": "x"}, call]})).json()["error"]
    assert error["param"] == "input"
    assert error["message"].startswith("input: not JSON")


async def test_thinking_is_turned_off_by_the_effort(openai: AsyncOpenAI, engine: Any) -> None:
    await openai.responses.create(model="thinker", input="x", reasoning={"effort": "none"})
    assert prompt_text(engine).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "image"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "store": "yes"}, "store"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "input.0.encrypted_content"),
        ({"input": "x", "reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"input": "x", "text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "max_output_tokens": 100_000}, "max_output_tokens"),
        ({"input": "a" * 5000}, "input"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 5}}}},
            "text.format",
        ),
        ({"input": "x", "top_logprobs": 99}, "top_logprobs"),
        ({"input": "x", "model": "plain"}, "model"),
        ({"input": "x", "conversation": "c"}, "conversation"),
    ],
)
async def test_what_is_not_supported_is_refused_by_the_name_that_it_has_here(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert (await client.post(URL, json={"input": "x"})).status_code == 200


async def test_a_list_that_is_too_short_is_told_by_its_length_alone(client: httpx.AsyncClient) -> None:
    error = (await client.post(URL, json={"input": []})).json()["error"]
    assert error["message"].endswith("list should have at least 1 item, not 0")


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
async def test_what_would_have_been_kept_is_refused_with_what_to_do_instead(
    client: httpx.AsyncClient, field: str
) -> None:
    """It was said that there is no such field, which there is where answers are kept."""
    error = (await client.post(URL, json={"input": "x", field: "kept"})).json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "send the whole conversation" in error["message"]
    assert (await client.post(URL, json={"input": "x", field: None})).status_code == 200


async def test_faults_are_the_client_s_own_types(openai: AsyncOpenAI, engine: Any) -> None:
    with pytest.raises(BadRequestError) as bad:
        await openai.responses.create(model="tiny", input="x", temperature=9)
    assert bad.value.param == "temperature"
    engine.fail_after, engine.failure = 3, GenerationFailed("a number is not finite")
    received = []

    async def read() -> None:
        async for event in await openai.responses.create(model="tiny", input="x", stream=True):
            received.append(event.type)  # noqa: PERF401 (what came before the fault counts)

    with pytest.raises(APIError):
        await read()
    assert received[-1] == "response.output_text.delta"


async def test_what_clients_send_by_default_is_taken_and_the_answer_tells_the_truth(openai: AsyncOpenAI) -> None:
    """Each of these was a 400, `store` in clients that only say what OpenAI's default is."""
    answer = await openai.responses.create(
        model="thinker", input="x", store=True, include=[], truncation="disabled", service_tier="auto", user="u",
        safety_identifier="s", prompt_cache_key="k", parallel_tool_calls=True, metadata={"a": "b"},
        reasoning={"effort": "high", "summary": "auto"}, text={"verbosity": "medium"},
    )  # fmt: skip
    assert answer.model_extra is not None
    assert answer.model_dump()["store"] is False
    assert answer.reasoning is not None
    assert (answer.reasoning.effort, answer.reasoning.summary) == ("high", "auto")


async def test_a_summary_of_thoughts_is_the_thoughts_themselves(openai: AsyncOpenAI, engine: Any) -> None:
    engine.reply = THOUGHT
    answer = await openai.responses.create(model="thinker", input="x", reasoning={"summary": "detailed"})
    reasoning: Any = answer.output[0]
    assert (reasoning.content[0].text, reasoning.summary) == ("A greeting.", [])


async def test_items_of_other_servers_are_taken_back(client: httpx.AsyncClient, engine: Any) -> None:
    plain: list[Any] = [
        {"role": "user", "content": "Hello"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
    ]
    part = {**plain[1]["content"][0], "annotations": [], "logprobs": [], "parsed": None, "extra": 1}
    more = {"id": "x_1", "status": "completed", "namespace": "n", "created_by": "me", "parsed_arguments": {}}
    decorated = [item | more for item in plain]
    decorated[1] = decorated[1] | {"content": [part], "phase": "final_answer"}
    for items in (plain, decorated):
        assert (await client.post(URL, json={"input": items})).status_code == 200
    assert prompt_text(engine, 0) == prompt_text(engine, 1)


async def test_truncation_is_refused_with_the_reason(client: httpx.AsyncClient) -> None:
    error = (await client.post(URL, json={"input": "x", "truncation": "auto"})).json()["error"]
    assert error["param"] == "truncation"
    assert "never left out" in error["message"]
