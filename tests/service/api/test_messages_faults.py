"""`/v1/messages`: what is wrong is refused by name, and every fault of these paths comes in Anthropic's envelope."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from model.chat_template import ChatTemplate
from service.api.schemas_chat import MAX_MESSAGES
from service.app import create_app
from service.engine.aliases import sticky_key
from service.errors import DeadlineExceeded, GenerationFailed, Overloaded, Unavailable
from service.settings import Settings

URL, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER = {"role": "user", "content": "x"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
GOOD = {"messages": [USER], "max_tokens": 20}


def said(*blocks: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": list(blocks)}]


# What the message must name, and bad values of its first part.
PROMPT: list[tuple[str, list[Any]]] = [
    ("model", [5, "", "nope", "../../etc/passwd", "a" * 300, ["tiny"], "tiny@v2", "encoder", "plain"]),
    ("messages", [5, "hi", {}, [], [USER] * 5000, said(*[{"type": "tool_result", "tool_use_id": "c"}] * 5000)]),
    ("messages.0", [["hi"], [5], [{"content": "x"}], [{"role": "boss", "content": "x"}], [{"role": 5}]]),
    ("messages.0.other", [[USER | {"other": 1}]]),
    ("messages.0.content", [[{"role": "user"}], [{"role": "user", "content": 5}], said()]),
    ("messages.0.content.0", [
        said("x"), said({"type": "audio"}), said({"text": "x"}), said(USE),
        said({"type": "tool_result", "tool_use_id": "c"}, role="assistant"),
        said({"type": "thinking", "thinking": "x"}), said({"type": "redacted_thinking", "data": "x"}),
    ]),
    ("messages.0.content.0: images are not supported", [said(IMAGE), said(IMAGE, role="assistant")]),
    ("messages.0.content.0: documents are not supported", [said({"type": "document"})]),
    ("messages.0.content.0.content.0: images are not supported", [
        said({"type": "tool_result", "tool_use_id": "c", "content": [IMAGE]}),
    ]),
    ("messages.0.content.0.text", [said({"type": "text"}), said({"type": "text", "text": 5})]),
    ("messages.0.content.0.cache_control.type", [said({"type": "text", "text": "x", "cache_control": {"type": "x"}})]),
    ("messages.0.content.0.tool_use_id", [
        said({"type": "tool_result"}), said({"type": "tool_result", "tool_use_id": ""}),
    ]),
    ("messages.0.content.0.is_error", [said({"type": "tool_result", "tool_use_id": "c", "is_error": "no"})]),
    ("messages.0.content.0.input", [said(USE | {"input": "{}"}, role="assistant")]),
    ("messages.0.content.0.name", [said({"type": "tool_use", "id": "c", "input": {}}, role="assistant")]),
    ("messages.0.content.0.signature", [said({"type": "thinking", "thinking": "x", "signature": 5}, role="assistant")]),
    ("messages.1", [[USER, *said(USE, role="assistant")]]),
    ("system", [5, {}]),
    ("system.0", [[5], [IMAGE]]),
    ("system.0.type", [[USE]]),
    ("tools", [5, {}, [TOOL] * 200]),
    ("tools.0", [["f"]]),
    ("tools.0.type", [[{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]]),
    ("tools.0.name", [[TOOL | {"name": name}] for name in ("", "a b", "x" * 65, 5)]),
    ("tools.0.input_schema", [[{"name": "f"}], [TOOL | {"input_schema": "object"}]]),
    ("tools.0.defer_loading", [[TOOL | {"defer_loading": True}]]),
    ("tools.1.name", [[TOOL, TOOL]]),
    ("tool_choice", ["any", 5, {"type": "required"}, {"type": "any"}, {"type": "tool", "name": "g"}]),
    ("tool_choice.name", [{"type": "tool"}]),
    ("tool_choice.disable_parallel_tool_use", [{"type": "none", "disable_parallel_tool_use": True}]),
    ("thinking", ["on", {}, {"type": "between_tools"}, {"type": "enabled", "budget_tokens": 5}]),
    ("thinking.budget_tokens", [{"type": "enabled"}, {"type": "enabled", "budget_tokens": 0}]),
    ("thinking.display", [{"type": "adaptive", "display": "omitted"}]),
    ("output_config.effort", [{"effort": "huge"}, {"effort": "low"}]),
    ("output_config.format", [{"format": {"type": "json_schema"}}, {"format": "json"}]),
    ("cache_control", [5]),
    ("chat_template_kwargs.magic", [{"magic": 1}]),
    ("mcp_servers", [[{}]]),
    ("container", ["c"]),
    ("context_management", [{"edits": []}]),
]  # fmt: skip

SAMPLING: list[tuple[str, list[Any]]] = [
    ("messages", [said({"type": "text", "text": "a" * 5000})]),
    ("max_tokens", [None, 0, -1, 1.5, "5", True, 10**30, 5000]),
    ("thinking.budget_tokens", [{"type": "enabled", "budget_tokens": 20}]),
    ("temperature", [-0.1, 2.1, "hot"]),
    ("top_p", [-0.1, 1.1]),
    ("top_k", [-2, 1.5]),
    ("stop_sequences", ["x", 5, ["a"] * 17]),
    ("stop_sequences.0", [[""], [5]]),
    ("stream", ["yes", 1]),
    ("metadata.user_id", [{"user_id": 5}]),
    ("metadata.name", [{"name": "x"}]),
    ("service_tier", ["priority"]),
    ("output_config.format", [{"format": SCHEMA | {"schema": {"type": "nope"}}}]),
    ("stop", ["x"]),
    ("max_completion_tokens", [5]),
    ("n", [2]),
]


async def test_as_many_messages_as_fit_and_a_system_prompt_are_one_turn_too_many(client: httpx.AsyncClient) -> None:
    turns = [USER, {"role": "assistant", "content": "x"}] * (MAX_MESSAGES // 2)
    response = await client.post(URL, json={"messages": turns, "system": "Be kind.", "max_tokens": 20})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("messages has 4,097 turns; the limit is 4,096")


def table() -> list[Any]:
    rows = []
    for url, fields in ((URL, [*PROMPT, *SAMPLING]), (COUNT, PROMPT)):
        for named, values in fields:
            rows += [pytest.param(url, named, value, id=f"{url}-{named}-{n}") for n, value in enumerate(values)]
    return rows


def good(url: str) -> dict[str, Any]:
    return {"messages": [USER]} if url == COUNT else GOOD


def fault_of(response: httpx.Response) -> dict[str, str]:
    told = response.json()
    assert set(told) == {"type", "error", "request_id"}
    assert told["type"] == "error"
    assert told["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    fault: dict[str, str] = told["error"]
    assert set(fault) == {"type", "message"}
    return fault


@pytest.mark.parametrize(("url", "named", "value"), table())
async def test_a_wrong_field_is_named_and_the_next_request_answered(
    client: httpx.AsyncClient, url: str, named: str, value: Any
) -> None:
    body = good(url) | {named.partition(":")[0].split(".")[0]: value}
    response = await client.post(url, json=body)
    assert response.status_code in (400, 404), response.text[:300]
    fault = fault_of(response)
    assert fault["type"] == ("not_found_error" if response.status_code == 404 else "invalid_request_error")
    assert named in fault["message"]
    assert len(fault["message"]) < 2000
    assert (await client.post(url, json=good(url))).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}, "model": "thinker"}, "output_config."),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}, "output_config": {"format": SCHEMA}}, "tool_choice: "),
        ({"messages": [USER], "max_tokens": 2040}, "max_tokens: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking: tiny does not think"),
    ],
)  # fmt: skip
async def test_what_does_not_go_together_is_told(client: httpx.AsyncClient, body: Any, message: str) -> None:
    response = await client.post(URL, json=GOOD | body)
    assert response.status_code == 400
    assert fault_of(response)["message"].startswith(message)


@pytest.mark.parametrize(
    ("thinking", "status"), [({"type": "disabled"}, 400), ({"type": "enabled", "budget_tokens": 5}, 200)]
)
async def test_a_model_that_always_thinks_cannot_be_told_not_to(
    client: httpx.AsyncClient, engine: Any, thinking: Any, status: int
) -> None:
    template = ChatTemplate("{{ messages[0].content }}<think>{# and then </think> #}")
    engine.models["always"] = replace(engine.models["thinker"], chat_template=template)
    response = await client.post(URL, json=GOOD | {"model": "always", "thinking": thinking})
    assert response.status_code == status
    if status == 400:
        assert fault_of(response)["message"].startswith("thinking: ")


@pytest.mark.parametrize(
    ("failure", "status", "type"),
    [
        (Overloaded("full", retry_after=2.2), 429, "rate_limit_error"),
        (Unavailable("restarting"), 503, "overloaded_error"),
        (GenerationFailed("not finite"), 500, "api_error"),
        (DeadlineExceeded("too late"), 504, "timeout_error"),
        (ZeroDivisionError("of our own making"), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_fault_before_the_first_token_has_its_status(
    client: httpx.AsyncClient, engine: Any, failure: Exception, status: int, type: str, streamed: bool
) -> None:
    engine.refusal = failure
    response = await client.post(URL, json=GOOD | {"stream": streamed})
    assert response.status_code == status
    fault = fault_of(response)
    assert fault["type"] == type
    assert "of our own making" not in fault["message"]
    assert response.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)


async def test_other_paths_keep_their_envelope(client: httpx.AsyncClient) -> None:
    assert fault_of(await client.post(URL, json={}))
    for path in ("/v1/chat/completions", "/v1/messagesx", "/v1/responses"):
        response = await client.post(path, json={})
        assert set(response.json()) == {"error"}
        assert "request-id" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "type"),
    [
        ("GET", URL, "", {}, 405, "invalid_request_error"),
        ("POST", f"{URL}/batches", "{}", {}, 404, "not_found_error"),
        ("POST", URL, "{", {}, 400, "invalid_request_error"),
        ("POST", URL, "x", {"content-type": "text/plain"}, 415, "invalid_request_error"),
        ("POST", URL, json.dumps(GOOD | {"system": "a" * 2000}), {}, 413, "request_too_large"),
    ],
)
async def test_what_never_reaches_its_handler_is_refused_in_the_same_envelope(
    make_client: Callable[..., httpx.AsyncClient],
    method: str, path: str, content: str, headers: dict[str, str], status: int, type: str,
) -> None:  # fmt: skip
    client = make_client(max_body_bytes=1024)
    headers = {"content-type": "application/json", "x-request-id": "mine"} | headers
    response = await client.request(method, path, content=content, headers=headers)
    assert response.status_code == status
    assert fault_of(response)["type"] == type
    assert response.headers["request-id"] == "mine"


@pytest.fixture
async def make_client(engine: Any) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    made: list[httpx.AsyncClient] = []

    def make(**settings: Any) -> httpx.AsyncClient:
        app: FastAPI = create_app(Settings(**settings), engine)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        made.append(httpx.AsyncClient(transport=transport, base_url="http://test"))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


async def test_a_key_is_needed_and_may_come_as_these_clients_send_it(
    make_client: Callable[..., httpx.AsyncClient], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("alice:sk-alice-0123\n")
    client = make_client(api_keys_file=tmp_path / "keys", rate_limit_requests=2)
    for headers in ({}, {"x-api-key": "sk-wrong-0123"}):
        response = await client.post(URL, json=GOOD, headers=headers)
        assert response.status_code == 401
        assert fault_of(response)["type"] == "authentication_error"
    key = {"x-api-key": "sk-alice-0123", "anthropic-version": "2023-06-01"}
    assert (await client.post(URL, json=GOOD, headers=key)).status_code == 200
    assert (await client.post(COUNT, json=good(COUNT), headers=key)).status_code == 200
    response = await client.post(URL, json=GOOD, headers=key)
    assert response.status_code == 429
    assert fault_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) > 0


async def test_the_same_user_has_the_same_version(client: httpx.AsyncClient, engine: Any) -> None:
    """What `user` is to OpenAI's clients, `metadata.user_id` is here."""
    seen: list[str] = []
    resolve = engine.resolve

    def watched(name: str | None, task: str) -> Any:
        seen.append(sticky_key())
        return resolve(name, task)

    engine.resolve = watched
    await client.post(URL, json=GOOD | {"metadata": {"user_id": "u"}})
    await client.post("/v1/chat/completions", json={"messages": [USER], "user": "u"})
    assert seen[0] == seen[-1] == "/u"
