"""Connections on real sockets: slow, large, broken and many; each is bounded, and others go on."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import StreamingResponse

from service.api.state import app_state
from service.http import protocol as protocol_module
from service.http.joined_writes import JoinedWrites
from service.http.protocol import ConnectionLimits, bounded_protocol
from service.server import DrainingServer

GOOD = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
QUICK_SECONDS = 0.05
LONG_SECONDS = 600.0


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Sends, and reads one response with a length."""
        self.writer.write(data)
        return await self.answer()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(head[0].split()[1]), headers, body

    async def ended(self) -> bool:
        """Waits for the end of what the other side sends."""
        return await self.reader.read() == b""


@pytest.fixture
async def make_server(make_app) -> AsyncIterator:
    """Starts the real server with these limits; returns a function that opens a connection to it."""
    running, connections = [], []

    async def make(*, app=None, **changes):
        limits = {"max_connections": 50, "max_header_bytes": 4096}
        limits |= {"header_timeout_seconds": LONG_SECONDS, "write_timeout_seconds": LONG_SECONDS}
        app = app or make_app(max_body_bytes=1000, body_timeout=changes.pop("body_timeout", LONG_SECONDS))
        protocol = bounded_protocol(ConnectionLimits(**{**limits, **changes}))
        config = uvicorn.Config(app, port=0, http=protocol, ws="none", log_config=None, timeout_graceful_shutdown=0)
        server = DrainingServer(config, app_state(app))
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        running.append(server)

        async def connect():
            address = server.servers[0].sockets[0].getsockname()
            connections.append(Connection(*await asyncio.open_connection(*address)))
            return connections[-1]

        return connect

    yield make
    for connection in connections:
        connection.writer.close()
    for server in running:
        await server.shutdown()


def error_code(body):
    return json.loads(body)["error"]["code"]


async def test_good_requests_share_a_connection(make_server):
    connection = await (await make_server())()
    assert [(await connection.ask(GOOD))[0] for _ in range(3)] == [200] * 3


async def test_head_and_body_of_an_answer_leave_together(make_server, monkeypatch):
    bodies, send = [], JoinedWrites._send_with_head
    monkeypatch.setattr(JoinedWrites, "_send_with_head", lambda self, data: (bodies.append(data), send(self, data)))
    connection = await (await make_server())()
    assert (await connection.ask(GOOD))[2] == bodies[0]


async def test_an_answer_that_is_its_head_alone_waits_for_nothing(make_server, monkeypatch):
    """It counts as complete at once: whoever closes the connection then would take the head with it."""
    held, write = [], JoinedWrites.write
    monkeypatch.setattr(JoinedWrites, "write", lambda self, data: (held.append(data), write(self, data)))
    connection = await (await make_server())()
    connection.writer.write(b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await connection.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    assert held == []
    assert (await connection.ask(GOOD))[0] == 200
    assert held


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 5000,
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(1000)) + b"\r\n",
        b"GET /" + b"x" * 5000,
    ],
)
async def test_headers_beyond_the_limit_get_431_and_the_connection_ends(make_server, head):
    connect = await make_server()
    connection = await connect()
    status, headers, body = await connection.ask(head)
    assert (status, error_code(body), headers["connection"]) == (431, "headers_too_large", "close")
    assert await connection.ended()
    assert (await (await connect()).ask(GOOD))[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /version HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_not_http_gets_400_in_the_envelope_and_the_connection_ends(make_server, data):
    connect = await make_server()
    connection = await connect()
    status, headers, body = await connection.ask(data)
    assert (status, headers["connection"]) == (400, "close")
    assert error_code(body) == "invalid_request"
    assert await connection.ended()
    assert (await (await connect()).ask(GOOD))[0] == 200


async def test_headers_that_do_not_come_in_time_get_408(make_server):
    connection = await (await make_server(header_timeout_seconds=QUICK_SECONDS))()
    status, _, body = await connection.ask(b"GET /livez HTTP/1.1\r\nHost:")
    assert (status, error_code(body)) == (408, "request_timeout")
    assert await connection.ended()


async def test_connection_that_never_speaks_is_closed(make_server):
    connection = await (await make_server(header_timeout_seconds=QUICK_SECONDS))()
    assert await connection.ended()


async def test_second_request_that_stops_in_its_headers_gets_408(make_server):
    connection = await (await make_server(header_timeout_seconds=QUICK_SECONDS))()
    assert (await connection.ask(GOOD))[0] == 200
    assert (await connection.ask(b"GET /livez"))[0] == 408


async def test_body_that_does_not_come_in_time_gets_408(make_server):
    connection = await (await make_server(body_timeout=QUICK_SECONDS))()
    head = b"POST /version HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
    status, headers, _ = await connection.ask(head)
    assert (status, headers["connection"]) == (408, "close")
    assert await connection.ended()


async def test_connections_beyond_the_limit_get_503_but_probes_are_answered(make_server):
    connect = await make_server(max_connections=3)
    idle = [await connect() for _ in range(3)]
    assert [(await connection.ask(GOOD))[0] for connection in idle] == [200] * 3
    probe = await connect()
    assert (await probe.ask(GOOD))[0] == 200
    for line in (b"GET /version", b"POST /"):
        status, headers, body = await (await connect()).ask(line + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, error_code(body), headers["retry-after"]) == (503, "unavailable", "1")
    assert (await idle[0].ask(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200


async def test_even_probes_have_a_limit(make_server, monkeypatch):
    monkeypatch.setattr(protocol_module, "PROBE_CONNECTIONS", 1)
    connect = await make_server(max_connections=1)
    first, second = await connect(), await connect()
    assert [(await connection.ask(GOOD))[0] for connection in (first, second)] == [200, 200]
    third = await connect()
    assert (await third.answer())[0] == 503
    assert await third.ended()


async def test_reader_that_stops_reading_is_dropped_and_its_stream_is_cleaned_up(make_server, make_app):
    app, cleaned_up = make_app(), asyncio.Event()

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def chunks():
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)
            finally:
                cleaned_up.set()

        return StreamingResponse(chunks())

    connect = await make_server(app=app, write_timeout_seconds=QUICK_SECONDS)
    stalled = await connect()
    stalled.writer.write(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
    await cleaned_up.wait()
    assert (await (await connect()).ask(GOOD))[0] == 200


async def test_half_open_requests_do_not_hold_up_others(make_server):
    connect = await make_server()
    stuck = [await connect() for _ in range(40)]
    for number, connection in enumerate(stuck):
        head = b"POST /version HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        connection.writer.write(head[: 20 + 3 * number])
    assert (await (await connect()).ask(GOOD))[0] == 200


async def test_running_request_is_told_that_the_client_left_though_others_wait_behind_it(make_server, make_app):
    """uvicorn told only the last request of a connection, and the one that ran went on for nobody."""
    app, begun, told = make_app(), asyncio.Event(), asyncio.Event()

    @app.get("/wait")
    async def wait(request: Request) -> None:
        begun.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        told.set()

    connection = await (await make_server(app=app))()
    connection.writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD * 3)
    await begun.wait()
    connection.writer.close()
    await told.wait()


async def test_requests_sent_ahead_are_answered_in_order_up_to_a_limit(make_server):
    connect = await make_server()
    few = await connect()
    few.writer.write(GOOD * protocol_module.MAX_PIPELINED)
    assert [(await few.answer())[0] for _ in range(protocol_module.MAX_PIPELINED)] == [
        200
    ] * protocol_module.MAX_PIPELINED
    many = await connect()
    status, headers, body = await many.ask(GOOD * 100)
    assert (status, headers["connection"], error_code(body)) == (400, "close", "invalid_request")
    assert await many.ended()


@pytest.mark.parametrize(
    ("framing", "body"),
    [(b"Content-Length: 7", b'{"a":1}'), (b"Transfer-Encoding: chunked", b'3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n')],
)
@pytest.mark.parametrize("num_pieces", [1, 3])
async def test_body_of_a_request_that_asks_for_http_2_is_read_and_answered(
    make_server, make_app, framing, body, num_pieces
):
    """Java's client and curl ask for h2c beside a body; the parser kept the body back, and the request hung."""
    app = make_app()

    @app.post("/echo")
    async def echo(body: dict[str, int]) -> dict[str, int]:
        return body

    connection = await (await make_server(app=app))()
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + upgrade + framing + b"\r\n\r\n"
    data = (head + body + GOOD) * 2
    size = len(data) // num_pieces + 1
    for start in range(0, len(data), size):
        connection.writer.write(data[start : start + size])
        await asyncio.sleep(0)
    for _ in range(2):
        assert (await connection.answer())[::2] == (200, b'{"a":1}')
        assert (await connection.answer())[0] == 200
