"""Who may pass: nobody new while draining, nobody without a key where keys are set, nobody beyond the key's rate.

Everything needs a key but the probes and the page at /docs (and /metrics where that is asked for), so a new route is
closed until it is opened here. Pure ASGI. Runs in the API process, on the event loop.
"""

import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.state import AppState, scope_record
from service.engine.aliases import sticky_key_context
from service.errors import Forbidden, RateLimited, ServiceError, Unauthorized, Unavailable
from service.http.envelope import Headers, send_error
from service.logs import RequestRecord

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping", "/"})
"""They are asked with GET or HEAD; `POST /` is a task."""
METRICS = "/metrics"
PAGE = "/docs"
"""The same everywhere; what it tells of this service it reads from the description, which needs a key."""
ADMIN = "/admin"
ADMIN_PATHS = frozenset({ADMIN, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
DRAINING_RETRY_AFTER_SECONDS = 5.0
BYTES_PER_TOKEN = 4
"""Only for the first estimate of a request's tokens; the count replaces it when the request has ended."""


class Gate:
    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state
        self._metrics_public = state.settings.metrics_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        record = scope_record(scope)
        now = time.monotonic()
        try:
            self._refuse_while_draining(scope)
            record.client = self._authenticate(scope, now)
            sticky_key_context.set(record.client)
        except ServiceError as error:
            await self._refuse(send, record, error)
            return
        if self._state.rate_limiter.enabled and scope["method"] == "POST" and not is_admin(scope):
            await self._run_limited(record, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        is_page = path == PAGE and scope["method"] in ("GET", "HEAD")
        return is_probe(scope["method"], path) or is_page or (self._metrics_public and path == METRICS)

    def _refuse_while_draining(self, scope: Scope) -> None:
        if self._state.draining and scope["method"] == "POST":
            self._state.metrics.rejected("draining")
            raise Unavailable("the service is shutting down: retry", retry_after=DRAINING_RETRY_AFTER_SECONDS)

    def _authenticate(self, scope: Scope, now: float) -> str:
        """The name of the key that the request carries; "" where none is needed."""
        authenticator = self._state.authenticator
        if is_admin(scope):
            return self._authenticate_manager(_key(scope), now)
        if not authenticator.needs_key:
            return ""
        key = _key(scope)
        if key is None:
            self._state.metrics.rejected("unauthorized")
            raise Unauthorized("no API key: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`")
        name = authenticator.client(key, now)
        if name is None:
            self._state.metrics.rejected("unauthorized")
            raise Unauthorized("the API key is not known")
        return name

    def _authenticate_manager(self, key: str | None, now: float) -> str:
        authenticator = self._state.authenticator
        if not authenticator.allows_management:
            raise Forbidden("management is off: start the service with --admin-keys-file")
        name = authenticator.manager(key, now) if key is not None else None
        if name is None:
            self._state.metrics.rejected("unauthorized")
            if key is not None and authenticator.client(key, now) is not None:
                raise Forbidden("this key is not for management: use one of the admin keys")
            raise Unauthorized("management needs an admin key: send it as `Authorization: Bearer KEY`")
        return name

    async def _run_limited(self, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        limiter = self._state.rate_limiter
        estimate = _content_length(scope) // BYTES_PER_TOKEN
        decision = limiter.admit(record.client, estimated_tokens=estimate, now=time.monotonic())
        if decision.refused is not None:
            self._state.metrics.rejected("rate_limit")
            error = RateLimited(f"rate limit reached: {decision.refused} per minute")
            error.retry_after = decision.retry_after
            await self._refuse(send, record, error, decision.headers)
            return

        def send_with_limits(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *decision.headers]
            return send(message)

        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            limiter.settle(
                record.client,
                estimated_tokens=estimate,
                actual_tokens=record.charged_tokens(),
                now=time.monotonic(),
            )

    async def _refuse(
        self, send: Send, record: RequestRecord, error: ServiceError, headers: Headers | None = None
    ) -> None:
        record.error = error.code or ""
        await send_error(send, error, headers=headers, close=True)


def is_probe(method: str, path: str) -> bool:
    return path in PROBES and method in ("GET", "HEAD")


def is_admin(scope: Scope) -> bool:
    path: str = scope["path"]
    return path in ADMIN_PATHS or path.startswith(f"{ADMIN}/")


def _key(scope: Scope) -> str | None:
    """The bearer token; where there is none, what Anthropic's clients send in a header of its own."""
    headers = dict(reversed(scope["headers"]))  # of several of one name, the first counts
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get(b"x-api-key", b"").decode("latin-1")
    return key.strip() or None


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
