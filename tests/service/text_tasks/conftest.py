"""The worker's lanes in this process, over the tiny checkpoints of `tests/reference`, behind the application."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from lane_engine import LaneEngine
from tiny_checkpoints import make

from service.app import create_app
from service.engine.models import LoadedModel
from service.settings import Settings

RECORDED = Path(__file__).parents[2] / "reference" / "pipelines.json"


@pytest.fixture
def engine() -> LaneEngine:
    return LaneEngine()


Load = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(name): the folder of a tiny checkpoint, made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: root / name if (root / name).is_dir() else make(name, root / name)


@pytest.fixture
def load(engine: LaneEngine, checkpoint: Callable[[str], Path]) -> Load:
    """load(name): a tiny checkpoint in the engine."""
    return lambda name, **settings: engine.load(checkpoint(name), **settings)


@pytest.fixture
def app(engine: LaneEngine) -> FastAPI:
    return create_app(Settings(), engine)  # type: ignore[arg-type]


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


Post = Callable[..., Any]


@pytest.fixture
def post(client: httpx.AsyncClient) -> Post:
    """await post(path, **body): the answer to a request that must succeed."""

    async def send(path: str, **body: Any) -> dict[str, Any]:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    return send


@pytest.fixture
def refused(client: httpx.AsyncClient) -> Post:
    """await refused(path, **body): the error of a request that is the caller's fault."""

    async def send(path: str, **body: Any) -> dict[str, Any]:
        response = await client.post(path, json=body)
        assert 400 <= response.status_code < 500, response.text
        error: dict[str, Any] = response.json()["error"]
        return error

    return send


@pytest.fixture(scope="session")
def recorded() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]
    return cases
