"""Versions over HTTP: who may change them, what a change answers, and that a refused one changes nothing."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request

from service.api.state import request_state
from service.app import create_app
from service.settings import Settings
from tests.service.engine.faults.scripted import scripted_engine, write_checkpoint

ADMIN_KEY = "admin-0123456789"
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Of a service that serves `m@1` and has a further route, which says what version of `m` the caller gets."""
    keys = tmp_path / "admin-keys"
    keys.write_text(f"boss:{ADMIN_KEY}\n")
    async with scripted_engine(write_checkpoint(tmp_path, 11)) as engine:
        app = create_app(Settings(admin_keys_file=keys), engine)

        @app.post("/v1/which")
        async def which(request: Request) -> str:
            resolve: Any = request_state(request).engine
            version: str = resolve.resolve("m", "generate").version
            return version

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=HEADERS) as client:
            yield client


async def deploy(client: httpx.AsyncClient, folder: Path, **more: Any) -> httpx.Response:
    return await client.post("/admin/models/m", json={"source": str(folder), **more})


def shares(card: dict[str, Any]) -> dict[str, float]:
    return {entry["version"]: entry["weight"] for entry in card["versions"] if entry["state"] == "ready"}


async def test_a_version_goes_into_service_and_one_call_takes_it_back(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    answer = await deploy(client, write_checkpoint(tmp_path, 12), version="2", keep_former=True)
    assert answer.status_code == 200, answer.text
    assert shares(answer.json()) == {"2": 1.0, "1": 0.0}
    assert answer.json()["can_roll_back"]
    assert (await client.post("/v1/which")).json() == "2"
    answer = await client.post("/admin/models/m/rollback")
    assert shares(answer.json())["1"] == 1.0
    assert (await client.post("/v1/which")).json() == "1"
    listed = (await client.get("/admin/models")).json()["data"]
    assert [card["name"] for card in listed] == ["m"]


async def test_a_refused_version_answers_409_with_the_reason_and_is_listed_as_the_last_failure(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    answer = await deploy(client, write_checkpoint(tmp_path, 12, refuse=""), version="2")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "swap_failed"
    assert "a tensor is missing" in answer.json()["error"]["message"]
    (card,) = (await client.get("/admin/models")).json()["data"]
    assert shares(card) == {"1": 1.0}
    assert "a tensor is missing" in card["last_failure"]
    again = await deploy(client, write_checkpoint(tmp_path, 13), version="1")
    assert again.status_code == 409


async def test_a_users_requests_all_get_the_same_version_of_a_divided_name(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    await deploy(client, write_checkpoint(tmp_path, 12), version="2", switch=False)
    answer = await client.put("/admin/models/m/alias", json={"weights": {"1": 0.5, "2": 0.5}, "shadow": None})
    assert shares(answer.json()) == {"1": 0.5, "2": 0.5}
    for user in ("ann", "bob", "cy", "dee"):
        got = {(await client.post("/v1/which", json={"user": user})).json() for _ in range(5)}
        assert len(got) == 1
    users = [(await client.post("/v1/which", json={"user": f"user-{number}"})).json() for number in range(40)]
    assert set(users) == {"1", "2"}
    nobody = [(await client.post("/v1/which")).json() for _ in range(40)]
    assert set(nobody) == {"1", "2"}


async def test_a_version_without_a_share_is_removed_and_one_with_a_share_is_not(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    await deploy(client, write_checkpoint(tmp_path, 12), version="2", switch=False)
    assert (await client.delete("/admin/models/m@1")).status_code == 409
    assert (await client.delete("/admin/models/m@2")).status_code == 204
    assert (await client.delete("/admin/models/m@2")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/admin/models/m", {}),
        ("POST", "/admin/models/m", {"source": "x", "surprise": 1}),
        ("POST", "/admin/models/m", {"source": "x", "version": "../1"}),
        ("POST", "/admin/models/m", {"source": "x", "kv_cache_memory": 10**34}),
        ("POST", "/admin/models/m", {"source": "x", "max_model_len": 10**34}),
        ("POST", "/admin/models/m%20n", {"source": "x"}),
        ("PUT", "/admin/models/m/alias", {"weights": {}}),
        ("PUT", "/admin/models/m/alias", {"weights": {"1": -1}}),
    ],
)
async def test_a_malformed_change_is_a_400(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any]
) -> None:
    answer = await client.request(method, path, json=body)
    assert answer.status_code == 400, answer.text


async def test_an_unknown_version_in_an_alias_is_a_404_and_weights_of_zero_a_409(client: httpx.AsyncClient) -> None:
    assert (await client.put("/admin/models/m/alias", json={"weights": {"9": 1.0}})).status_code == 404
    assert (await client.put("/admin/models/m/alias", json={"weights": {"1": 0.0}})).status_code == 409
    assert (await client.put("/admin/models/n/alias", json={"weights": {"1": 1.0}})).status_code == 404


async def test_nothing_changes_without_an_admin_key(client: httpx.AsyncClient, tmp_path: Path) -> None:
    client.headers.pop("Authorization")
    assert (await deploy(client, tmp_path)).status_code == 401
    for method, path in (("GET", ""), ("PUT", "/m/alias"), ("POST", "/m/rollback"), ("DELETE", "/m")):
        assert (await client.request(method, f"/admin/models{path}")).status_code == 401
