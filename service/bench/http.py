"""A small asynchronous HTTP/1.1 client whose own cost stays out of what it measures.

One connection, kept alive, a request at a time; the body is handed over as it arrives. Parsing is httptools' (the
parser of uvicorn). Knows nothing of what is asked. Runs in the benchmark's process.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

import httptools

CROSSED_SECONDS = 0.5
"""A connection that ends sooner after a request, without a word, was closed before the server had it."""


class BenchHTTPError(Exception):
    """The server answered with an error status, or not with HTTP at all."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Connection:
    """Opened when it is first used, and again after it was closed."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._url: SplitResult = urlsplit(url)
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._heads: dict[str, bytes] = {}
        """For each path what every request for it begins with, up to the body's length."""
        self._wire: _Wire | None = None

    async def post(self, path: str, body: bytes, on_body: Callable[[bytes], None]) -> None:
        """Sends `body` and calls `on_body` with each piece of the answer.

        A kept connection that is found closed is opened anew: the server had the right to close it.

        Raises:
            BenchHTTPError: the status is not 200, or the server closed the connection early.
        """
        request = b"%s%d\r\n\r\n%s" % (self._head(path), len(body), body)
        while True:
            kept, began = self._wire, time.perf_counter()
            wire = await self._connect()
            try:
                await wire.ask(request, on_body)
                break
            except BaseException as error:
                self.close()
                was_idle = wire is kept and not wire.heard and time.perf_counter() - began < CROSSED_SECONDS
                if not isinstance(error, BenchHTTPError) or not was_idle:
                    raise
        if not wire.keeps_alive:
            self.close()
        if wire.parser.get_status_code() != 200:
            raise BenchHTTPError(b"".join(wire.refusal).decode(errors="replace")[:300], wire.parser.get_status_code())

    def close(self) -> None:
        if self._wire is not None:
            self._wire.transport.close()

    async def aclose(self) -> None:
        self.close()
        if self._wire is not None:
            await self._wire.closed.wait()

    def _head(self, path: str) -> bytes:
        if path not in self._heads:
            self._heads[path] = (
                f"POST {self._url.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
                f"Content-Type: application/json\r\n{self._headers}Content-Length: "
            ).encode()
        return self._heads[path]

    async def _connect(self) -> "_Wire":
        if self._wire is None or self._wire.transport.is_closing():
            secure = self._url.scheme == "https"
            port = self._url.port or (443 if secure else 80)
            context = ssl.create_default_context() if secure else None
            loop = asyncio.get_running_loop()
            _, self._wire = await loop.create_connection(_Wire, self._url.hostname or "", port, ssl=context)
        return self._wire


class _Wire(asyncio.Protocol):
    """The open connection: what comes goes through the parser, which calls the `on_...` methods of this object."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.refusal: list[bytes] = []
        """The body of an answer whose status is not 200."""
        self.keeps_alive = self.heard = False
        self.closed = asyncio.Event()
        self._on_body: Callable[[bytes], None] = self.refusal.append
        self._answer: asyncio.Future[None] | None = None

    def ask(self, request: bytes, on_body: Callable[[bytes], None]) -> "asyncio.Future[None]":
        """Sends a request; what is returned is done when the answer is complete."""
        self.parser = httptools.HttpResponseParser(self)
        self.refusal.clear()
        self.heard = False
        self._on_body = on_body
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():  # nothing was asked
            self.transport.close()
            return
        self.heard = True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BenchHTTPError(f"the server does not speak HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.closed.set()
        self._fail(BenchHTTPError("the server closed the connection before the answer was complete"))

    def on_body(self, piece: bytes) -> None:
        try:
            (self._on_body if self.parser.get_status_code() == 200 else self.refusal.append)(piece)
        except ValueError as error:
            self._fail(error)

    def on_message_complete(self) -> None:
        self.keeps_alive = self.parser.should_keep_alive()  # afterwards the parser has forgotten the headers
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
