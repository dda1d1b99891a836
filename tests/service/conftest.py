"""Factories for the service's own layers: an engine that needs no model, an application around it, a client."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.engine.models import ModelDirectory
from service.settings import Settings


class FakeDescription:
    architecture = "LlamaForCausalLM"
    tasks = ("generate", "chat")
    context_length = 512
    base = None
    labels: tuple[str, ...] = ()
    heads: ClassVar[dict[str, Any]] = {}


class FakeModel:
    def __init__(self, name: str, version: str = "1") -> None:
        self.name, self.version, self.key = name, version, f"{name}@{version}"
        self.base = None
        self.state = "ready"
        self.loaded = None
        self.description = FakeDescription()


class FakeEngine:
    """An engine by what the application asks of it; tests set its state."""

    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models: Any = ModelDirectory({"tiny": FakeModel("tiny")})  # type: ignore[dict-item]
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")

    async def drain(self, timeout_seconds: float) -> None:
        self.calls.append(f"drain {timeout_seconds:g}")
        self.state = "draining"

    async def stop(self) -> None:
        self.calls.append("stop")
        self.state = "stopped"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SLIMPAJAMA_"):
            monkeypatch.delenv(name)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_app(engine: FakeEngine) -> Callable[..., FastAPI]:
    def make(**settings: Any) -> FastAPI:
        return create_app(Settings(**settings), engine)  # type: ignore[arg-type]

    return make


@pytest.fixture
async def make_client(make_app: Callable[..., FastAPI]) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """A client of an application with these settings; `app` takes one that has been made, or given more routes."""
    async with AsyncExitStack() as stack:

        async def make(app: FastAPI | None = None, **settings: Any) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app=app or make_app(**settings), raise_app_exceptions=False)
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))

        yield make


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@pytest.fixture
async def base_url(app: FastAPI) -> AsyncIterator[str]:
    """The application behind a real socket, for what an in-process transport cannot show: streams, leaving clients,
    clients that bring their own transport."""
    server = Server(uvicorn.Config(app, port=0, log_level="critical", ws="none", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    await server.listening.wait()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task
