"""Puts the HTTP application together: state, layers, routes, fault handlers. There is no module-level application.

From the outside in: `AnthropicEnvelope` (how some paths word errors), `Entry` (id, access line), CORS where asked for,
`Gate` (draining, keys, rates), `BodyReader` (limits, JSON), `InHand` (what a drain waits for), `Shortcut` (to the
handlers of plain paths), then the routes. Knows the engine only by what `service.api.state.Engine` says. Runs in the
API process.
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from service.admission import RateLimiter
from service.api import (
    admin,
    answer,
    chat,
    classify,
    cohere,
    completions,
    docs,
    embeddings,
    health,
    hugging_face,
    lora,
    messages,
    metrics,
    models,
    rerank,
    responses,
    roots,
    score,
    sentiment,
    summarize,
    tag,
    tei,
    tei_tokens,
    text_generation,
    tokenize,
    translate,
)
from service.api.openapi import describe_with_envelope
from service.api.state import AppState, Engine, app_state, attach
from service.auth import Authenticator
from service.http.anthropic_envelope import AnthropicEnvelope
from service.http.body import BodyLimits, BodyReader
from service.http.entry import Entry
from service.http.faults import install_fault_handlers
from service.http.gate import Gate
from service.http.in_hand import InHand
from service.http.shortcut import Shortcut
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Tracer

TRACER_CLOSE_SECONDS = 3.0
RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{kind}-{name}" for kind in ("limit", "remaining", "reset") for name in ("requests", "tokens")
)

# Routes are tried in turn: those that are asked most come first.
ROUTERS = (
    completions.router,
    chat.router,
    responses.router,
    messages.router,
    embeddings.router,
    rerank.router,
    cohere.router,
    score.router,
    health.router,
    models.router,
    metrics.router,
    docs.router,
    tokenize.router,
    tei.router,
    tei_tokens.router,
    text_generation.router,
    roots.router,
    hugging_face.router,
    classify.router,
    sentiment.router,
    tag.router,
    summarize.router,
    translate.router,
    answer.router,
    admin.router,
    lora.router,
)


class Application(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """Without the framework's own outermost layers: `Entry` answers what nobody handled, `BodyReader` bounds."""
        outermost: Any = self.user_middleware[0].cls
        stack: ASGIApp = super().build_middleware_stack()
        while type(stack) is not outermost:
            stack = cast(Any, stack).app
        return stack


def package_version() -> str:
    try:
        return version("slimpajama")
    except PackageNotFoundError:
        return "unknown"


def create_app(
    settings: Settings, engine: Engine, *, registry: Metrics | None = None, tracer: Tracer | None = None
) -> FastAPI:
    """The application around an engine that has not been started. `registry` is the one that the engine records in.

    Raises KeyFileError if a key file cannot be read.
    """
    state = AppState(
        settings=settings,
        engine=engine,
        metrics=registry or Metrics(build_version=package_version()),
        authenticator=Authenticator(
            settings.api_keys_file,
            settings.admin_keys_file,
            settings.api_key.get_secret_value() if settings.api_key is not None else None,
        ),
        rate_limiter=RateLimiter(
            requests_per_minute=settings.rate_limit_requests, tokens_per_minute=settings.rate_limit_tokens
        ),
        tracer=tracer,
        version=package_version(),
        started_at=int(time.time()),
    )
    app = Application(
        title="SlimPajama",
        version=state.version,
        description="Every text task of Transformer checkpoints behind one REST service.",
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,  # `service.api.docs` is ours: the framework's pages load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours say it; even looking for theirs costs
    )
    attach(app, state)
    _add_layers(app, state)
    install_fault_handlers(app, [route for router in ROUTERS for route in router.routes])
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = functools.partial(describe_with_envelope, app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Our server drains before it ends the lifespan; where another runs the application, it is drained here."""
    state = app_state(app)
    await state.engine.start()
    try:
        yield
    finally:
        if not state.draining:
            await state.drain()
        await state.engine.stop()
        if state.tracer is not None:
            await asyncio.to_thread(state.tracer.close, TRACER_CLOSE_SECONDS)


def _add_layers(app: FastAPI, state: AppState) -> None:
    """The framework puts each layer around those before it: the last one added is the outermost."""
    settings = state.settings
    routes = [route for router in ROUTERS for route in router.routes]
    app.add_middleware(Shortcut, routes=routes)
    app.add_middleware(InHand, state=state)
    limits = BodyLimits(
        max_bytes=settings.max_body_bytes,
        max_json_depth=settings.max_json_depth,
        timeout_seconds=settings.body_timeout,
    )
    app.add_middleware(BodyReader, limits=limits)
    app.add_middleware(Gate, state=state)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients add headers of their own; no cookies are involved
            expose_headers=["X-Request-ID", "Retry-After", *RATE_LIMIT_HEADERS],
        )
    known_paths = frozenset(str(getattr(route, "path", "")) for route in routes)
    app.add_middleware(Entry, state=state, known_paths=known_paths)
    app.add_middleware(AnthropicEnvelope)
