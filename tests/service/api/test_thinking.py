"""Thoughts before a reply that is held to something: free up to their end, told apart, only where thinking is on."""

import json
from typing import Any

import httpx
import pytest

from model.grammar import GrammarCompiler, Matcher
from service.engine.flight import GenerateRequest

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
HELD: dict[str, tuple[dict[str, Any], str, str]] = {
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
               '{"n": 5}', '{"m": 5}'),
    "object": ({"response_format": {"type": "json_object"}}, '{"m": {}}', "[5]"),
    "regex": ({"regex": "[a-c]+"}, "abc", "abd"),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes", "maybe"),
    "grammar": ({"grammar": 'start: "a" INT\nINT: /[0-9]+/\n%ignore " "'}, "a 12", "b 12"),
    "tool": ({"tools": TOOLS, "tool_choice": "required"}, CALL, CALL.replace("now", "then")),
}  # fmt: skip
CASES = pytest.mark.parametrize(("body", "good", "bad"), HELD.values(), ids=HELD)
ON = ["thinker", "special-thinker", "opener", "special-opener"]
THOUGHT = "Is it {}? <tool é\n"


async def requested(client: httpx.AsyncClient, engine: Any, **body: Any) -> GenerateRequest:
    response = await client.post(URL, json={"messages": HELLO, "max_tokens": 200} | body)
    assert response.status_code == 200, response.text
    request: GenerateRequest = engine.requests[-1]
    return request


def matcher(engine: Any, request: GenerateRequest) -> Matcher:
    """As the worker has it."""
    tokenizer = engine.models[request.model.partition("@")[0]].tokenizer
    compiler = GrammarCompiler(tokenizer.backend.to_str(), 270, [258])
    assert request.sampling.grammar is not None
    compiler.start(1, request.sampling.grammar)
    while not compiler.any_done:
        pass
    assert compiler.done() == [(1, None)]
    compiler.close()
    found = compiler.matcher(1)
    assert found is not None
    return found


def accepts(engine: Any, request: GenerateRequest, text: str) -> bool:
    """Whether the worker lets the whole reply through, and then its end."""
    tokenizer, state = engine.models[request.model.partition("@")[0]].tokenizer, matcher(engine, request)
    return all(state.advance(id) is None for id in [*tokenizer.encode(text, add_special_tokens=False), 258])


def opening(model: str) -> str:
    return "" if "opener" in model else "<think>\n"


@pytest.mark.parametrize("model", ON)
@CASES
async def test_what_is_thought_is_free_and_what_is_said_is_held(
    client: httpx.AsyncClient, engine: Any, model: str, body: dict[str, Any], good: str, bad: str
) -> None:
    request = await requested(client, engine, model=model, **body)
    thoughts = f"{opening(model)}{THOUGHT}</think>"
    for between in ("", "\n\n"):
        assert accepts(engine, request, thoughts + between + good)
        assert not accepts(engine, request, thoughts + between + bad)
    assert not accepts(engine, request, thoughts)
    assert not accepts(engine, request, opening(model) + THOUGHT)
    assert accepts(engine, request, good) is ("opener" not in model)
    assert not accepts(engine, request, bad)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("model", ON)
@CASES
async def test_thoughts_are_told_apart_from_what_is_held(
    client: httpx.AsyncClient, engine: Any, model: str, streamed: bool, body: dict[str, Any], good: str, bad: str
) -> None:
    engine.reply = f"{opening(model)}{THOUGHT}</think>\n\n{good}"
    response = await client.post(URL, json={"messages": HELLO, "model": model, "stream": streamed} | body)
    if streamed:
        events = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
    else:
        deltas = [response.json()["choices"][0]["message"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == THOUGHT.rstrip()
    assert "".join(delta.get("content") or "" for delta in deltas) == ("" if good == CALL else good)
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert "".join(call["function"].get("name") or "" for call in calls) == ("now" if good == CALL else "")


@pytest.mark.parametrize(
    "off",
    [
        {"model": "thinker", "chat_template_kwargs": {"enable_thinking": False}},
        {"model": "special-thinker", "chat_template_kwargs": {"enable_thinking": False}},
        {"model": "thinker", "reasoning_effort": "none"},
        {"model": "thinker", "continue_final_message": True,
         "messages": [*HELLO, {"role": "assistant", "content": "Well, "}]},
        {"model": "tiny"},
    ],
)  # fmt: skip
@CASES
async def test_where_thinking_is_off_the_reply_is_held_from_its_first_token_on(
    client: httpx.AsyncClient, engine: Any, off: dict[str, Any], body: dict[str, Any], good: str, bad: str
) -> None:
    request = await requested(client, engine, **off, **body)
    assert accepts(engine, request, good)
    assert not accepts(engine, request, f"<think>\n{THOUGHT}</think>{good}")


async def test_a_thought_that_the_caller_has_begun_is_thought_to_its_end(
    client: httpx.AsyncClient, engine: Any
) -> None:
    """Its rest was content, up to and with the marker."""
    messages = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "<think>Let me"}]}]
    engine.reply = " see.</think>\nabc"
    body = {"model": "opener", "messages": messages, "continue_final_message": True, "regex": "[a-c]+"}
    message = (await client.post(URL, json=body)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("see.", "abc")
    assert accepts(engine, engine.requests[-1], engine.reply)


async def test_thoughts_have_no_special_tokens_and_do_not_end_the_reply(client: httpx.AsyncClient, engine: Any) -> None:
    for model in ON:
        request = await requested(client, engine, model=model, regex="a")
        tokenizer, state = engine.models[model].tokenizer, matcher(engine, request)
        for id in tokenizer.encode(opening(model) + "x", add_special_tokens=False):
            assert state.advance(id) is None
        assert not state.finished
        assert state.advance(258) is not None


async def test_the_markers_letters_do_not_end_thoughts_that_a_token_ends(
    client: httpx.AsyncClient, engine: Any
) -> None:
    """They would be read as the end, and what follows as the answer."""
    request = await requested(client, engine, model="special-opener", regex="a")
    state = matcher(engine, request)
    for byte in b"x </think":
        assert state.advance(engine.models["tiny"].tokenizer.encode(chr(byte), add_special_tokens=False)[0]) is None
    assert state.advance(engine.models["tiny"].tokenizer.encode(">", add_special_tokens=False)[0]) is not None
