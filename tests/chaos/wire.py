"""A client that costs next to nothing: requests as bytes over kept connections, for loads that httpx would not get out.

Knows no JSON and follows nothing; an answer is its status, the headers and the time it took.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools


@dataclass(slots=True)
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    whole: bool = False


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.answer = Answer()
        self.ended: asyncio.Future[None] | None = None

    def ask(self, data: bytes) -> "asyncio.Future[None]":
        self.answer, self.parser = Answer(), httptools.HttpResponseParser(self)
        self.ended = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.ended

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode().lower()] = value.decode()

    def on_message_complete(self) -> None:
        self.answer.status, self.answer.whole = self.parser.get_status_code(), True
        self._end()

    def _end(self) -> None:
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)


class Wire:
    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[_Connection] = []

    async def ask(self, data: bytes) -> Answer:
        """The answer to a framed request; status 0 if the connection broke before it was whole."""
        began = time.perf_counter()
        connection = self._idle.pop() if self._idle else await self._connect()
        await connection.ask(data)
        answer = connection.answer
        answer.seconds = time.perf_counter() - began
        if answer.whole and connection.parser.should_keep_alive() and not connection.transport.is_closing():
            self._idle.append(connection)
        else:
            connection.transport.abort()
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().transport.abort()

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self._port)
        return connection


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: chaos\r\n\r\n".encode()
