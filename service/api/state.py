"""What handlers reach through a request, with types: the engine, the settings, the metrics, the request's own record.

`create_app` puts an `AppState` onto the application, and nothing else is shared. Runs in the API process.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, cast

from fastapi import FastAPI, Request
from starlette.types import Scope

from service.admission import RateLimiter
from service.auth import Authenticator
from service.engine.models import ModelDirectory
from service.logs import RequestRecord
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Tracer

RECORD_KEY = "request_record"
BODY_KEY = "json_body"
"""Where a request's scope has what its body says, once that has been read and found sound."""
WHOLE_KEY = "is_whole"
"""In the scope of a request that has come whole: nothing of it has to be waited for."""


class Engine(Protocol):
    """What the application asks of the engine, beside what each task does with it.

    `start` returns once the worker is being started: loading goes on behind it, and `state` tells. `drain` refuses new
    work from its first moment, and returns when all accepted work has ended, what is left after the limit included.
    """

    @property
    def state(self) -> str: ...

    @property
    def alive(self) -> bool:
        """False once nobody would start a worker any more."""
        ...

    @property
    def models(self) -> ModelDirectory: ...

    async def start(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> None: ...

    async def stop(self) -> None: ...


class RequestsInHand:
    """How many requests have been let in and are not answered whole."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        self._count += 1
        self._none.clear()

    def end(self) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def until_none(self, timeout_seconds: float) -> float:
        """Returns what is left of the time."""
        if not self._count:
            return timeout_seconds
        began = time.monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), timeout_seconds)
        return max(0.0, began + timeout_seconds - time.monotonic())


@dataclass(slots=True, kw_only=True)
class AppState:
    """One per application. `draining` is set by the server as soon as it is told to end, before the engine knows."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    authenticator: Authenticator
    rate_limiter: RateLimiter
    tracer: Tracer | None = None
    version: str
    started_at: int
    """Unix time in seconds."""
    draining: bool = False
    in_hand: RequestsInHand = field(default_factory=RequestsInHand)

    @property
    def engine_state(self) -> str:
        state = self.engine.state
        return "draining" if self.draining and state != "failed" else state

    async def drain(self) -> None:
        """Nobody new is let in; those who were have the engine until they are answered, within the drain's time."""
        self.draining = True
        await self.engine.drain(await self.in_hand.until_none(self.settings.drain_timeout))


def attach(app: FastAPI, state: AppState) -> None:
    vars(app.state)["slimpajama"] = state  # as an attribute it would be looked up in a function


def app_state(app: FastAPI) -> AppState:
    return cast(AppState, app.state.slimpajama)


def request_state(request: Request) -> AppState:
    return app_state(request.app)


def request_record(request: Request) -> RequestRecord:
    """The line that the access log will get: handlers fill in model, tokens, times and finish reason."""
    return scope_record(request.scope)


def scope_record(scope: Scope) -> RequestRecord:
    return cast(RequestRecord, scope["state"][RECORD_KEY])
