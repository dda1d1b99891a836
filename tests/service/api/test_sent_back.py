"""Conversations as clients send them back: what they were given comes along, from us and from other servers."""

from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
THOUGHT = "<think>\nA greeting.\n</think>\n\nHello, wörld 🦙!"


def prompt_text(engine: Any, number: int = -1) -> str:
    text: str = engine.models["tiny"].tokenizer.decode(engine.requests[number].prompt_ids, skip_special_tokens=False)
    return text


async def post(client: httpx.AsyncClient, messages: list[Any], **body: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={"messages": messages, "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize(
    ("plain", "decorated"),
    [
        ([HELLO], [{**HELLO, "type": "text"}]),  # lm-evaluation-harness
        ([HELLO], [{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "x"}}]}]),
        (
            [HELLO, {"role": "assistant", "content": "Yes?"}, HELLO],
            [
                HELLO,
                {
                    "role": "assistant", "content": "Yes?", "refusal": None, "annotations": [], "audio": None,
                    "function_call": None, "tool_calls": None, "provider_specific_fields": {"refusal": None},
                    "reasoning_details": [{"type": "reasoning.text", "text": "x"}], "thinking_blocks": [],
                },
                HELLO,
            ],
        ),
        (
            [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            [
                HELLO,
                {
                    "role": "assistant", "content": None,
                    "tool_calls": [{**CALL, "index": 0, "extra_content": {"google": {"thought_signature": "x"}},
                                    "function": {**CALL["function"], "provider_specific_fields": {}}}],
                },
            ],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/tokenize"])
async def test_keys_that_other_servers_put_into_messages_change_nothing(
    client: httpx.AsyncClient, engine: Any, path: str, plain: list[Any], decorated: list[Any]
) -> None:
    """Each was a 400: no client could go on with a conversation that another server had begun."""
    found = []
    for messages in (plain, decorated):
        response = await client.post(path, json={"messages": messages})
        assert response.status_code == 200, response.text
        found.append(prompt_text(engine) if path == CHAT else response.json()["tokens"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "audio": {"id": "a"}}, "messages.0.audio"),
        ({"role": "user", "content": "x", "images": ["aGk="]}, "messages.0.images"),
        (
            {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}},
            "messages.0.function_call",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]},
            "messages.0.content.0.type",
        ),
        ({"role": "user", "contents": "x"}, "messages.0.content"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "messages.0.content"),
        ({"role": "assistant", "content": None, "reasoning_content": ""}, "messages.0.content"),
    ],
)
async def test_what_would_be_missed_is_refused_all_the_same(
    client: httpx.AsyncClient, message: dict[str, Any], param: str
) -> None:
    response = await client.post(CHAT, json={"messages": [message]})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)


@pytest.mark.parametrize("max_tokens", [12, 100])
async def test_our_own_answer_is_taken_back(client: httpx.AsyncClient, engine: Any, max_tokens: int) -> None:
    """One that was cut off while it thought has no content, and was refused for that."""
    engine.reply = THOUGHT
    answer = await post(client, [HELLO], model="thinker", max_tokens=max_tokens)
    message = answer["choices"][0]["message"]
    assert (message["content"] is None) == (max_tokens == 12)
    await post(client, [HELLO, message, HELLO], model="thinker")
    said = message["content"] or ""
    assert f"<|im_start|>assistant\n{said}<|im_end|>" in prompt_text(engine)
