"""What a generating request may ask for beside its text: priority, and time for everything, its grammar included."""

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.batch import Grammar
from service.app import create_app
from service.settings import Settings
from service.tasks import grammars

KEY = {"Authorization": "Bearer sk-alice-0123"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Say", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
}

MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
async def make_client(engine: Any, tmp_path: Path) -> AsyncIterator[MakeClient]:
    clients: list[httpx.AsyncClient] = []

    def make(*, keys: bool = False, **settings: Any) -> httpx.AsyncClient:
        if keys:
            (tmp_path / "keys").write_text("alice:sk-alice-0123\n")
            settings["api_keys_file"] = tmp_path / "keys"
        transport = httpx.ASGITransport(app=create_app(Settings(**settings), engine), raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://test", headers=KEY))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("keys", "settings", "highest"),
    [(False, {}, 1000), (True, {}, 0), (True, {"max_priority": 5}, 5), (False, {"max_priority": -2}, -2)],
)
async def test_nobody_outranks_others_unless_the_operator_lets_them(
    make_client: MakeClient, engine: Any, path: str, keys: bool, settings: dict[str, Any], highest: int
) -> None:
    client = make_client(keys=keys, **settings)
    response = await client.post(path, json={**BODIES[path], "priority": highest})
    assert response.status_code == 200
    assert engine.requests[-1].priority == highest
    response = await client.post(path, json={**BODIES[path], "priority": highest + 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
    assert (await client.post(path, json={**BODIES[path], "priority": -5})).status_code == 200


@pytest.fixture
def slow_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(grammar: Grammar, param: str) -> Grammar:
        time.sleep(0.3)
        return grammar

    monkeypatch.setattr(grammars, "_checked", check)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("settings", "body", "status", "code"),
    [
        ({}, {"timeout": 0.05}, 504, "deadline_exceeded"),
        ({"grammar_timeout": 0.05}, {}, 400, "invalid_grammar"),
        ({"grammar_timeout": 0.05}, {"timeout": 100}, 400, "invalid_grammar"),
        ({}, {"timeout": 100}, 200, None),
    ],
)
@pytest.mark.usefixtures("slow_check")
async def test_a_deadline_holds_while_a_grammar_is_checked(
    make_client: MakeClient, path: str, settings: dict[str, Any], body: dict[str, Any], status: int, code: str | None
) -> None:
    response = await make_client(**settings).post(path, json={**BODIES[path], "regex": "[ab]+", **body})
    assert response.status_code == status
    assert response.json().get("error", {}).get("code") == code
