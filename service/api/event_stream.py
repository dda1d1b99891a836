"""Answers that a client may leave: server-sent events, and work that is given up when the connection ends.

Knows HTTP and nothing of what is sent. Runs in the API process, on the event loop.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.state import scope_record
from service.errors import ClientGone, ServiceError
from service.http.envelope import encode_error

log = logging.getLogger(__name__)

T = TypeVar("T")
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; if the client leaves first, the work is cancelled.

    Raises: ClientGone, and whatever the work raises. Call it when the body has been read.
    """
    worker = asyncio.current_task()
    assert worker is not None
    has_left = is_done = False

    def give_up(watch: "asyncio.Future[None]") -> None:
        nonlocal has_left
        if not is_done and not watch.cancelled():
            has_left = True
            worker.cancel()

    watch = asyncio.ensure_future(_gone(request.receive))
    watch.add_done_callback(give_up)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and worker.uncancel() == 0:
            raise ClientGone("the client closed its connection") from None
        raise
    finally:
        is_done = True
        watch.cancel()


class EventStream(Response):
    """Sends events as they come. A fault in mid-stream is an `error` event, and then there is no `[DONE]`.

    The generator is always closed, and soon: at its end, at a fault, or when the client has left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, on_close: Callable[[], None]) -> None:
        """`on_close` is called at the end in any case, even if the first event was never asked for."""
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.raw_headers = list(HEADERS)
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(scope, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                scope_record(scope).error = ClientGone.code or ""
        finally:
            self._on_close()
            await _cancel(gone, sending)
            await self._events.aclose()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ServiceError as error:
            await self._send_error(scope, send, error)
        except OSError:
            raise  # the connection, not the work
        except Exception:
            log.exception("fault in a stream")
            await self._send_error(scope, send, ServiceError("internal error; the answer is incomplete"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _send_error(scope: Scope, send: Send, error: ServiceError) -> None:
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
