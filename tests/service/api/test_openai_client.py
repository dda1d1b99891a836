"""The official `openai` client against the service, over a real socket.

Set TEST_SERVICE_URL to run the tests that know nothing of the scripted engine against a running service.
"""

import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from openai import (
    APIError,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
)
from pydantic import BaseModel

from service.errors import GenerationFailed, Overloaded, Unavailable

SERVICE_URL = os.environ.get("TEST_SERVICE_URL")
scripted = pytest.mark.skipif(SERVICE_URL is not None, reason="needs the scripted engine")
HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


class Weather(BaseModel):
    city: str
    days: int


def agreeable(request: Any) -> str:
    """What a model might say within the constraint that it is under."""
    grammar = request.sampling.grammar
    answer = '{"city": "Bern", "days": 3}'
    if grammar is None:
        return "Hello, wörld 🦙!"
    return (
        f'<tool_call>\n{{"name": "weather", "arguments": {answer}}}\n</tool_call>' if grammar.kind == "lark" else answer
    )


@pytest.fixture
async def make_client(base_url: str, engine: Any) -> AsyncIterator[Callable[..., AsyncOpenAI]]:
    engine.reply = agreeable
    made: list[AsyncOpenAI] = []

    def make(**options: Any) -> AsyncOpenAI:
        url = f"{SERVICE_URL or base_url}/v1"
        made.append(AsyncOpenAI(base_url=url, **({"api_key": "none", "max_retries": 0} | options)))
        return made[-1]

    yield make
    for client in made:
        await client.close()


@pytest.fixture
def openai(make_client: Callable[..., AsyncOpenAI]) -> AsyncOpenAI:
    return make_client()


@pytest.fixture
async def model(openai: AsyncOpenAI) -> str:
    return (await openai.models.list()).data[0].id


async def test_models_are_listed_and_described(openai: AsyncOpenAI, model: str) -> None:
    found = await openai.models.retrieve(model)
    assert (found.id, found.object) == (model, "model")
    with pytest.raises(NotFoundError):
        await openai.models.retrieve("no-such-model")


@scripted
@pytest.mark.parametrize(("alias", "served"), [("gpt-4o", "tiny"), ("gpt-4o-mini", "llama")])
async def test_an_alias_is_listed_and_answered_by_what_it_stands_for(
    openai: AsyncOpenAI, engine: Any, alias: str, served: str
) -> None:
    names = [model.id async for model in await openai.models.list()]
    assert names[:-2] == list(engine.models)
    assert names[-2:] == ["gpt-4o", "gpt-4o-mini"], "one whose checkpoint is not there any more is not listed"
    card = await openai.models.retrieve(alias)
    assert (card.id, card.model_extra and card.model_extra["root"]) == (alias, served)
    answer = await openai.chat.completions.create(model=alias, messages=HELLO)
    assert answer.model == served
    assert engine.requests[-1].model == f"{served}@v1"
    with pytest.raises(NotFoundError, match="encoder, gpt-4o, gpt-4o-mini"):
        await openai.chat.completions.create(model="gpt-5", messages=HELLO)
    with pytest.raises(NotFoundError, match="'gone' is not loaded"):
        await openai.chat.completions.create(model="gone", messages=HELLO)


async def test_a_completion_and_its_stream_are_the_same_text(openai: AsyncOpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
    answer = await openai.completions.create(**options)
    chunks = [
        c async for c in await openai.completions.create(**options, stream=True, stream_options={"include_usage": True})
    ]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer.choices[0].text
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert answer.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_completions_take_lists_echo_and_logprobs(openai: AsyncOpenAI, model: str) -> None:
    answer = await openai.completions.create(
        model=model, prompt=["One", "Two"], n=2, max_tokens=3, echo=True, logprobs=2, temperature=0, seed=5
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.text.startswith(("One", "One", "Two", "Two")[choice.index])
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset or [])
        assert logprobs.token_logprobs[0] is None
        assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


async def test_a_reply_and_its_stream_are_the_same_message(openai: AsyncOpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": HELLO, "max_completion_tokens": 12, "temperature": 0}
    answer = await openai.chat.completions.create(**options)
    async with openai.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        events = [event.type async for event in stream]
        final = stream.current_completion_snapshot  # the final one raises where the length was reached
    assert "content.delta" in events or not answer.choices[0].message.content
    assert (final.choices[0].message.content or "") == (answer.choices[0].message.content or "")
    assert final.choices[0].message.role == answer.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == answer.choices[0].finish_reason
    assert final.usage is not None
    assert answer.usage is not None
    assert final.usage.completion_tokens == answer.usage.completion_tokens


@scripted
@pytest.mark.usefixtures("impatient")
async def test_signs_of_life_are_passed_over(openai: AsyncOpenAI, model: str, engine: Any) -> None:
    engine.hold_after = 0
    chunks = await openai.chat.completions.create(model=model, messages=HELLO, stream=True)
    assert not engine.released.is_set()
    engine.released.set()
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == "Hello, wörld 🦙!"


@scripted
@pytest.mark.usefixtures("impatient")
async def test_a_fault_after_a_sign_of_life_is_raised(openai: AsyncOpenAI, model: str, engine: Any) -> None:
    engine.hold_after, engine.fail_after, engine.failure = 0, 1, Unavailable("the worker is gone")
    chunks = await openai.chat.completions.create(model=model, messages=HELLO, stream=True)
    engine.released.set()
    with pytest.raises(APIError, match="the worker is gone"):
        _ = [chunk async for chunk in chunks]


async def test_logprobs_of_a_reply_are_one_for_each_token(openai: AsyncOpenAI, model: str) -> None:
    answer = await openai.chat.completions.create(
        model=model, messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens == 4
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in logprobs.content)


async def test_a_json_schema_is_held_to(openai: AsyncOpenAI, model: str) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    answer = await openai.chat.completions.create(model=model, messages=HELLO, response_format=schema, max_tokens=450)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "days"}


@scripted
async def test_the_client_parses_into_its_own_types(openai: AsyncOpenAI, model: str) -> None:
    answer = await openai.chat.completions.parse(model=model, messages=HELLO, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Bern", days=3)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_required_tool_is_called(openai: AsyncOpenAI, model: str, choice: Any) -> None:
    answer = await openai.chat.completions.create(
        model=model, messages=HELLO, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=200
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    follow_up = [*HELLO, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert (await openai.chat.completions.create(model=model, messages=follow_up, tools=TOOLS, max_tokens=5)).choices


async def test_streamed_tool_calls_are_put_together_by_the_client(openai: AsyncOpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": HELLO, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    async with openai.chat.completions.stream(**options, parallel_tool_calls=False) as stream:
        deltas = [event async for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = await stream.get_final_completion()
    assert len(deltas) > 1
    call: Any = (final.choices[0].message.tool_calls or [None])[0]
    assert call is not None
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    assert final.choices[0].finish_reason == "tool_calls"


async def test_faults_are_the_client_s_own_types(openai: AsyncOpenAI, model: str) -> None:
    with pytest.raises(NotFoundError) as missing:
        await openai.chat.completions.create(model="no-such-model", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as bad:
        await openai.chat.completions.create(model=model, messages=HELLO, temperature=5)
    assert bad.value.param == "temperature"
    with pytest.raises(BadRequestError) as long:
        await openai.completions.create(model=model, prompt="word " * 100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError) as unknown:
        await openai.chat.completions.create(model=model, messages=HELLO, extra_body={"no_such_field": 1})
    assert (unknown.value.param, unknown.value.code) == ("no_such_field", "unsupported_parameter")


@scripted
async def test_overload_and_failures_are_the_client_s_own_types(openai: AsyncOpenAI, engine: Any) -> None:
    engine.refusal = Overloaded("full", retry_after=2)
    with pytest.raises(RateLimitError) as overload:
        await openai.completions.create(model="tiny", prompt="x")
    assert overload.value.response.headers["retry-after"] == "2"
    engine.refusal = Unavailable("loading")
    with pytest.raises(InternalServerError) as unavailable:
        await openai.completions.create(model="tiny", prompt="x")
    assert unavailable.value.status_code == 503


@scripted
async def test_the_client_s_own_retries_get_through_a_short_overload(
    make_client: Callable[..., AsyncOpenAI], engine: Any
) -> None:
    attempts = []

    def reply(request: Any) -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise Overloaded("full", retry_after=0.01)
        return "fine"

    engine.reply = reply
    answer = await make_client(max_retries=1).completions.create(model="tiny", prompt="x")
    assert answer.choices[0].text == "fine"


@scripted
@pytest.mark.parametrize("chat", [True, False])
async def test_a_stream_that_fails_raises_in_the_client(openai: AsyncOpenAI, engine: Any, chat: bool) -> None:
    engine.fail_after, engine.failure = 3, GenerationFailed("a non-finite logit")
    stream: Any
    if chat:
        stream = await openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    else:
        stream = await openai.completions.create(model="tiny", prompt="x", stream=True)
    received: list[Any] = []

    async def read() -> None:
        async for chunk in stream:
            received.append(chunk)  # noqa: PERF401 (what came before the fault counts)

    with pytest.raises(APIError) as failed:
        await read()
    assert len(received) >= 3
    assert failed.value.code == "generation_failed"


@scripted
async def test_leaving_a_stream_cancels_the_request(openai: AsyncOpenAI, engine: Any) -> None:
    engine.hold_after = 3
    stream = await openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await engine.until(lambda: engine.cancelled == ["cancelled"])
