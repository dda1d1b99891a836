"""uvicorn's HTTP protocol with bounds on what a client may hold: connections, header bytes, and time in each direction.

uvicorn itself waits for ever for headers that do not come and for readers that do not read. Bodies are bounded further
in, by `service.http.body`. Runs in the API process, on the event loop; one instance per connection.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.state import WHOLE_KEY
from service.errors import InvalidRequest, ServiceError, Unavailable
from service.http.envelope import BodyTimeout, HeadersTooLarge, encode_error, error_headers
from service.http.gate import is_probe
from service.http.joined_writes import JoinedWrites

PROBE_CONNECTIONS = 64
"""Kept free beyond the limit, for probes alone: a flood of clients must not look like a dead service."""

MAX_PIPELINED = 16
"""Requests that a client may send ahead on one connection; each is held in memory until its turn."""

_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Unavailable"}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    max_connections: int
    max_header_bytes: int
    header_timeout_seconds: float
    write_timeout_seconds: float


class BoundedProtocol(HttpToolsProtocol):
    """`limits` is an attribute of the class: uvicorn makes the instances, with arguments of its own."""

    limits: ConnectionLimits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._received_bytes = 0
        self._in_headers = True
        self._in_body_of_upgrade = False
        self._fault: ServiceError | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._joined = JoinedWrites(transport, self.loop)
        self._for_probes = len(self.connections) > self.limits.max_connections
        if len(self.connections) > self.limits.max_connections + PROBE_CONNECTIONS:
            self._refuse(_too_many_connections())
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        self._tell_running()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("this is not HTTP/1.1")
            return
        if self._in_headers and self._received_bytes:
            self._go_on_with_headers()

    def _go_on_with_headers(self) -> None:
        """They are not complete yet: most requests come whole, and need no timer."""
        if self._received_bytes > self.limits.max_header_bytes:
            self._refuse(self._headers_too_large())
        elif self._header_timer is None and not self.transport.is_closing():
            self._expect_headers()

    def on_message_begin(self) -> None:
        if not self._in_body_of_upgrade:
            self._header_bytes = 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_body_of_upgrade:
            self._count_header_bytes(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body_of_upgrade:
            self._count_header_bytes(len(name) + len(value) + 4)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_body_of_upgrade:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(InvalidRequest(f"more than {MAX_PIPELINED} requests wait on this connection for their turn"))
        if self._for_probes and not self._asks_a_probe():
            self._fail(_too_many_connections())
        self._in_headers = False
        self._stop_header_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing():
            return  # only for the parser: see `_go_on_after_upgrade`
        self._in_body_of_upgrade = False
        super().on_message_complete()
        self.scope["state"][WHOLE_KEY] = True
        self._in_headers = True
        self._received_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """What the parser refused, or one of our own callbacks, in the envelope that every other fault has."""
        self._refuse(self._fault or InvalidRequest(msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._go_on_after_upgrade()

    def _go_on_after_upgrade(self) -> None:
        """Nothing is switched to, and so what follows is the request's own body (RFC 9110, 7.8): Java's client and
        curl ask for h2c with every POST. The parser takes it for the other protocol; another one is told of the body.
        """
        self.parser = httptools.HttpRequestParser(self)
        framing = self._framing()
        if framing:
            self._in_body_of_upgrade = True
            self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"\r\n"]))

    def _asks_a_probe(self) -> bool:
        return is_probe(self.parser.get_method().decode("latin-1"), self.url.partition(b"?")[0].decode("latin-1"))

    def _framing(self) -> list[bytes]:
        """The header lines that say that the request has a body."""
        return [
            name + b": " + value
            for name, value in self.headers
            if name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        ]

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.scope["method"] != "HEAD":  # whose answer is its head alone
            cycle.transport = self._joined  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def _tell_running(self) -> None:
        """uvicorn tells the last request of the connection that the client has left; the one that runs may be an
        earlier one, with others queued behind it, which are not begun any more."""
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self.limits.max_header_bytes:
            self._fail(self._headers_too_large())

    def _fail(self, fault: ServiceError) -> None:
        """Leaves a parser callback; the parser turns what it raises into its own error, and uvicorn that into a 400."""
        self._fault = fault
        raise fault

    def _headers_too_large(self) -> ServiceError:
        return HeadersTooLarge(f"request line and headers exceed {self.limits.max_header_bytes:,} bytes")

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_timeout_seconds, self._on_header_timeout)

    def _on_header_timeout(self) -> None:
        if self._is_answering():
            self._expect_headers()
        elif self._received_bytes:
            seconds = self.limits.header_timeout_seconds
            self._refuse(BodyTimeout(f"the headers did not arrive within {seconds:g} seconds"))
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ServiceError) -> None:
        """Answers and closes; an answer that has begun is broken off instead."""
        self._stop_header_timer()
        if self.transport.is_closing():
            return
        if not (self._is_answering() and self.cycle.response_started):
            body = encode_error(error)
            head = [
                f"HTTP/1.1 {error.status} {_REASONS[error.status]}".encode(),
                b"content-type: application/json",
                b"content-length: " + str(len(body)).encode(),
                b"connection: close",
                *(name + b": " + value for name, value in error_headers(error)),
            ]
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _too_many_connections() -> ServiceError:
    return Unavailable("too many connections: retry", retry_after=1.0)


def bounded_protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The protocol class to give to uvicorn."""
    return type("LimitedProtocol", (BoundedProtocol,), {"limits": limits})
