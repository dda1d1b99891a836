"""The outermost layer that answers: gives each request its id and its record, and writes what became of it.

One access line and one count per request, whatever happened inside; a fault that nobody handled becomes a 500 here.
Pure ASGI, so that streams pass as they are. Runs in the API process, on the event loop.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.state import RECORD_KEY, AppState
from service.engine.flight import trace_context
from service.errors import ServiceError
from service.http.envelope import send_error
from service.logs import REQUEST_ID, RequestRecord, request_id_context, write_access_line
from service.tracing import RequestSpan

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(REQUEST_ID.encode())
CLIENT_GONE_STATUS = 499


class Entry:
    """`known_paths` name the requests that were refused before they reached their route."""

    def __init__(self, app: ASGIApp, state: AppState, known_paths: frozenset[str]) -> None:
        self._app = app
        self._state = state
        self._known_paths = known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"][:256], time.monotonic())
        scope.setdefault("state", {})[RECORD_KEY] = record
        token = request_id_context.set(record.request_id)
        span = self._begin_span(record, scope)
        try:
            await self._run(record, scope, receive, send)
        finally:
            self._close(record, scope)
            if span is not None:
                span.end(record)
            request_id_context.reset(token)

    def _begin_span(self, record: RequestRecord, scope: Scope) -> RequestSpan | None:
        """None where nobody traces, or not this request."""
        tracer = self._state.tracer
        span = tracer.begin(record, scope["headers"]) if tracer is not None else None
        trace_context.set(span)
        record.trace_id = span.trace_id if span is not None else ""
        return span

    async def _run(self, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
                if self._state.draining and not any(name == b"connection" for name, _ in headers):
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            return send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            record.error = record.error or "cancelled"
            raise
        except Exception:
            log.exception("unhandled fault", extra={"method": record.method, "path": record.path})
            if record.status:
                record.error = ServiceError.code or ""
                return
            error = ServiceError(f"internal error; our log tells more under request id {record.request_id}")
            record.error = error.code or ""
            await send_error(send_with_id, error)

    def _close(self, record: RequestRecord, scope: Scope) -> None:
        record.status = record.status or CLIENT_GONE_STATUS
        known_path: str = scope["path"] if scope["path"] in self._known_paths else "unmatched"
        record.endpoint = str(getattr(scope.get("route"), "path", known_path))
        self._state.metrics.http_request(endpoint=record.endpoint, method=record.method, status=record.status)
        write_access_line(record, now=time.monotonic(), log_prompts=self._state.settings.log_prompts)


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is harmless in a header and in a log line, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req-{secrets.token_hex(12)}"
