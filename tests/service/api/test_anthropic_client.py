"""The official `anthropic` client against the service, over a real socket and with a key.

Set TEST_SERVICE_URL to run the tests that know nothing of the scripted engine against a running service.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import (
    APIStatusError,
    AsyncAnthropic,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
)
from fastapi import FastAPI
from pydantic import BaseModel

from service.app import create_app
from service.errors import GenerationFailed, Overloaded, Unavailable
from service.settings import Settings

SERVICE_URL = os.environ.get("TEST_SERVICE_URL")
scripted = pytest.mark.skipif(SERVICE_URL is not None, reason="needs the scripted engine")
KEY = "sk-alice-0123"
HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"name": "weather", "description": "How it is outside", "input_schema": WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
THOUGHT = "<think>\nA greeting.\n</think>\n\n"


class City(BaseModel):
    city: str


@pytest.fixture
def app(engine: Any, tmp_path: Path) -> FastAPI:
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    return create_app(Settings(api_keys_file=tmp_path / "keys"), engine)


@pytest.fixture
async def anthropic(base_url: str) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=SERVICE_URL or base_url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def model(anthropic: AsyncAnthropic) -> str:
    return (await anthropic.messages.create(model=None, messages=HELLO, max_tokens=1)).model  # type: ignore[arg-type]


async def test_a_message_and_its_stream_are_the_same(anthropic: AsyncAnthropic, model: str) -> None:
    options: Any = {"model": model, "messages": HELLO, "max_tokens": 12, "system": "Be kind."}
    options["extra_body"] = {"temperature": 0}  # the client itself has given it up
    whole = await anthropic.messages.create(**options)
    async with anthropic.messages.stream(**options) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert "".join(texts) == "".join(block.text for block in whole.content if block.type == "text")
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens <= 12
    assert whole._request_id
    raw = await anthropic.messages.create(**options, stream=True)
    assert [event.type async for event in raw][:2] == ["message_start", "content_block_start"]


async def test_counted_tokens_are_those_that_a_message_is_told_to_have(anthropic: AsyncAnthropic, model: str) -> None:
    counted = await anthropic.messages.count_tokens(model=model, messages=HELLO, system="Be kind.")
    answer = await anthropic.messages.create(model=model, messages=HELLO, system="Be kind.", max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


@scripted
async def test_thoughts_and_calls_go_back_and_forth(anthropic: AsyncAnthropic, engine: Any) -> None:
    engine.reply = THOUGHT + "I look. " + CALL
    options: Any = {"model": "thinker", "tools": TOOLS, "max_tokens": 500}
    options["thinking"] = {"type": "enabled", "budget_tokens": 100}
    whole = await anthropic.messages.create(messages=HELLO, **options)
    async with anthropic.messages.stream(messages=HELLO, **options) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json"} <= kinds
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    for block, told in zip(final.content, whole.content, strict=True):
        assert block.to_dict() | {"id": ""} == told.to_dict() | {"id": ""}
    call: Any = whole.content[-1]
    assert (whole.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Bern"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    follow_up: Any = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    engine.reply = "Rain."
    answer = await anthropic.messages.create(messages=follow_up, **options)
    assert [block.type for block in answer.content] == ["text"]
    text = engine.models["thinker"].tokenizer.decode(engine.requests[-1].prompt_ids, skip_special_tokens=False)
    assert "A greeting." in text
    assert "<tool_response>\nrain\n</tool_response>" in text


@scripted
async def test_a_reply_is_parsed_into_the_caller_s_type(anthropic: AsyncAnthropic, engine: Any) -> None:
    engine.reply = '{"city": "Bern"}'
    answer = await anthropic.messages.parse(model="tiny", messages=HELLO, max_tokens=100, output_format=City)
    assert answer.parsed_output == City(city="Bern")
    assert engine.requests[-1].sampling.grammar.kind == "json_schema"


@scripted
async def test_why_it_ended_is_told(anthropic: AsyncAnthropic) -> None:
    answer = await anthropic.messages.create(model="tiny", messages=HELLO, max_tokens=100, stop_sequences=["w", "x"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "w")
    answer = await anthropic.messages.create(model="tiny", messages=HELLO, max_tokens=3)
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)


async def test_faults_are_the_client_s_own_types(anthropic: AsyncAnthropic, model: str) -> None:
    with pytest.raises(NotFoundError) as missing:
        await anthropic.messages.create(model="no-such-model", messages=HELLO, max_tokens=5)
    assert missing.value.type == "not_found_error"
    with pytest.raises(BadRequestError) as bad:
        await anthropic.messages.create(model=model, messages=HELLO, max_tokens=5, extra_body={"temperature": 5})
    assert bad.value.type == "invalid_request_error"
    assert str(bad.value.api_message).startswith("temperature: ")
    assert bad.value.request_id
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    with pytest.raises(BadRequestError, match="images are not supported"):
        await anthropic.messages.create(model=model, messages=[{"role": "user", "content": [image]}], max_tokens=5)


@scripted
async def test_strangers_overload_and_failures_are_the_client_s_own_types(
    anthropic: AsyncAnthropic, engine: Any
) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 20}
    with pytest.raises(AuthenticationError) as stranger:
        await anthropic.with_options(api_key="sk-wrong-0123").messages.create(**options)
    assert stranger.value.type == "authentication_error"
    engine.refusal = Overloaded("full", retry_after=2)
    with pytest.raises(RateLimitError) as overload:
        await anthropic.messages.create(**options)
    assert overload.value.response.headers["retry-after"] == "2"
    engine.refusal = Unavailable("restarting")
    with pytest.raises(InternalServerError) as unavailable:
        await anthropic.messages.create(**options)
    assert unavailable.value.type == "overloaded_error"
    engine.refusal, engine.fail_after, engine.failure = None, 3, GenerationFailed("a number is not finite")
    async with anthropic.messages.stream(**options) as stream:
        with pytest.raises(APIStatusError, match="a number is not finite") as failed:
            await stream.until_done()
        assert failed.value.type == "api_error"
        assert stream.current_message_snapshot.to_dict()["content"] == [{"type": "text", "text": "Hel"}]
