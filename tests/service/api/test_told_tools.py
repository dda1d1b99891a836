"""Tools for chat templates that know none: what is told, in which place, and the rounds of a conversation with them."""

import json
from typing import Any

import httpx
import pytest

URL = "/v1/chat/completions"
HELLO = {"role": "user", "content": "Hello"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather in a city", "parameters": CITY}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now", "strict": True}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
MODELS = pytest.mark.parametrize("model", ["phi", "gemma", "special-opener"])


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": [HELLO], "tools": TOOLS} | body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def prompt_text(engine: Any) -> str:
    request = engine.requests[-1]
    model = engine.models[request.model.partition("@")[0]]
    text: str = model.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    return text


@MODELS
async def test_tools_are_told_and_called(client: httpx.AsyncClient, engine: Any, model: str) -> None:
    """They were refused with 400."""
    engine.reply = ("x</think>" if model == "special-opener" else "") + CALL
    choice = await ask(client, model=model)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Zürich"}'}
    text = prompt_text(engine)
    assert json.dumps(WEATHER) in text
    assert '\n{"name": "now"}\n' in text
    assert text.count("Hello") == 1
    assert engine.requests[-1].sampling.grammar is not None  # one of them is strict


async def test_they_stand_behind_the_caller_s_system_message(client: httpx.AsyncClient, engine: Any) -> None:
    await ask(client, model="phi", messages=[{"role": "developer", "content": "Be kind."}, HELLO])
    text = prompt_text(engine)
    assert text.startswith("<|system|>\nBe kind.\n\nYou can call tools.")
    assert text.count("<|system|>") == 1
    assert text.endswith("<|user|>\nHello<|end|>\n<|assistant|>\n")


async def test_they_stand_before_the_first_question_where_the_template_takes_no_system_message(
    client: httpx.AsyncClient, engine: Any
) -> None:
    await ask(client, model="gemma", messages=[HELLO, {"role": "assistant", "content": "Hi."}, HELLO])
    text = prompt_text(engine)
    assert text.index("user\nYou can call tools.") < text.index("\n\nHello<end_of_turn>") < text.index("Hi.")
    assert text.count("You can call tools.") == 1


@MODELS
async def test_calls_and_results_come_back_as_text(client: httpx.AsyncClient, engine: Any, model: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    said = {"role": "assistant", "content": "Let me see.", "tool_calls": [call, {**call, "id": "c2"}]}
    results = [{"role": "tool", "tool_call_id": id, "content": text} for id, text in (("c1", "rain"), ("c2", "snow"))]
    told = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsnow\n</tool_response>"
    for more, after in (([], ""), ([{"role": "user", "content": "Sure?"}], "\nSure?")):
        await ask(client, model=model, messages=[HELLO, said, *results, *more])
        text = prompt_text(engine)
        assert f"Let me see.\n{CALL}\n{CALL}" in text
        assert f"{told}{after}<" in text
    await ask(client, model=model, messages=[HELLO, said, *results], tools=[])
    assert told in prompt_text(engine)
    assert "You can call tools." not in prompt_text(engine)


@MODELS
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "now"]), ({"type": "function", "function": {"name": "now"}}, ["now"])],
)
async def test_required_calls_are_enforced_by_a_grammar(
    client: httpx.AsyncClient, engine: Any, model: str, choice: Any, names: list[str]
) -> None:
    engine.reply = CALL
    await ask(client, model=model, tool_choice=choice)
    grammar = engine.requests[-1].sampling.grammar.text
    assert [name for name in ("weather", "now") if f'\\"name\\": \\"{name}\\"' in grammar] == names


async def test_without_tools_the_messages_are_the_template_s_alone(client: httpx.AsyncClient, engine: Any) -> None:
    await ask(client, model="gemma", tool_choice="none")
    assert prompt_text(engine) == "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
