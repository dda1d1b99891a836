"""Answers that a client may leave: server-sent events, and work that is given up when the connection ends.

Knows HTTP and nothing of what is sent. Runs in the API process, on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.state import scope_record
from service.errors import ClientGone, ServiceError
from service.http.envelope import encode_error
from service.http.faults import answer_service_error

log = logging.getLogger(__name__)

T = TypeVar("T")
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
UNWATCHED_SECONDS = 0.05
"""Who leaves is noticed so much later: most work has ended by then, and a watch for it costs a task. Work that ends
sooner is counted as done, whoever is still there to read it."""
SIGN_OF_LIFE = b": keep-alive\n\n"
"""A comment: whoever reads events passes over it."""


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; if the client leaves first, the work is cancelled.

    Raises: ClientGone, and whatever the work raises. Call it when the body has been read.
    """
    worker = asyncio.current_task()
    assert worker is not None
    has_left = is_done = False
    watch: asyncio.Future[None] | None = None

    def give_up(ended: "asyncio.Future[None]") -> None:
        nonlocal has_left
        if not is_done and not ended.cancelled():
            has_left = True
            worker.cancel()

    def begin_watch() -> None:
        nonlocal watch
        watch = asyncio.ensure_future(_gone(request.receive))
        watch.add_done_callback(give_up)

    timer = asyncio.get_running_loop().call_later(UNWATCHED_SECONDS, begin_watch)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and worker.uncancel() == 0:
            raise ClientGone("the client closed its connection") from None
        raise
    finally:
        is_done = True
        timer.cancel()
        if watch is not None:
            watch.cancel()


class EventStream(Response):
    """Sends events as they come, and a comment whenever none has come for `quiet_seconds` (0: never).

    Status and headers go out with the first of either. A fault before them is answered with its own status; after them
    it is an `error` event, and then there is no `[DONE]`. The generator is always closed, and soon: at its end, at a
    fault, or when the client has left.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        quiet_seconds: float,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """`on_close` is called at the end in any case, before the generator is closed."""
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.raw_headers = list(HEADERS)
        self._events = events
        self._quiet_seconds = quiet_seconds
        self._on_close = on_close
        self._beginning = asyncio.Lock()
        self._has_begun = False
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._run(scope, receive, send)
        except ServiceError as error:  # nothing has been sent
            await answer_service_error(Request(scope), error)(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_sent = time.monotonic()
        signs = asyncio.ensure_future(self._send_signs(send))
        sending = asyncio.ensure_future(self._send_all(scope, send, signs))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                scope_record(scope).error = ClientGone.code or ""
        finally:
            if self._on_close is not None:
                self._on_close()
            await _cancel(gone, signs, sending)
            await self._events.aclose()

    async def _send_all(self, scope: Scope, send: Send, signs: "asyncio.Future[None]") -> None:
        """Raises what happens before the status is out; what happens after it is told in the stream."""
        try:
            async for event in self._events:
                if not self._has_begun:
                    await self._begin(send)
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._last_sent = time.monotonic()
            await self._begin(send)
        except OSError:
            raise  # the connection, not the work
        except Exception as error:
            async with self._beginning:  # the status may be on its way, with a sign of life
                if not self._has_begun:
                    raise
            await self._send_error(scope, send, error)
        finally:
            signs.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, send: Send) -> None:
        """Status and headers, once, whoever comes first: an event or a sign of life."""
        async with self._beginning:
            if not self._has_begun:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self._has_begun = True

    async def _send_signs(self, send: Send) -> None:
        """For proxies that cut a connection on which nothing moves. Sleeps while events flow: they set no timers."""
        while self._quiet_seconds:
            seconds = self._last_sent + self._quiet_seconds - time.monotonic()
            if seconds > 0:
                await asyncio.sleep(seconds)
                continue
            await self._begin(send)
            await send({"type": "http.response.body", "body": SIGN_OF_LIFE, "more_body": True})
            self._last_sent = time.monotonic()

    @staticmethod
    async def _send_error(scope: Scope, send: Send, error: Exception) -> None:
        if not isinstance(error, ServiceError):
            log.error("fault in a stream", exc_info=error)
            error = ServiceError("internal error; the answer is incomplete")
        scope_record(scope).error = error.code or ""
        event = b"event: error\ndata: " + encode_error(error) + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": True})


async def _gone(receive: Receive) -> None:
    """Returns when the client has left (or, where the transport says so, when the answer is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
