"""Streams and clients that leave, down to the messages of the server's protocol."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import Request

from service.api.event_stream import EventStream, until_gone
from service.api.state import RECORD_KEY
from service.errors import ClientGone, GenerationFailed
from service.logs import RequestRecord


class Connection:
    """A client by what the server's protocol says of it."""

    def __init__(self, *, reads: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.record = RequestRecord("id", "POST", "/x", 0.0)
        self.scope = {"type": "http", "state": {RECORD_KEY: self.record}, "headers": []}
        self._reads = reads

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self._reads is not None and len(self.sent) > self._reads:
            self.left.set()
            await asyncio.Event().wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Events of which somebody wants to know that they have been let go."""

    def __init__(self, *events: bytes, failure: Exception | None = None) -> None:
        self.closed: list[str] = []
        self._events, self._failure = events, failure

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self._events:
                yield event
            if self._failure is not None:
                raise self._failure
        finally:
            self.closed.append("generator")

    def stream(self) -> EventStream:
        return EventStream(self(), on_close=lambda: self.closed.append("work"))


async def run(source: Source, connection: Connection) -> None:
    async with asyncio.timeout(10):
        await source.stream()(connection.scope, connection.receive, connection.send)


async def test_events_go_out_one_by_one_and_then_the_answer_ends() -> None:
    source, connection = Source(b"a", b"b"), Connection()
    await run(source, connection)
    assert [message.get("body") for message in connection.sent] == [None, b"a", b"b", b""]
    assert connection.sent[-1]["more_body"] is False
    assert sorted(source.closed) == ["generator", "work"]


async def test_a_client_that_reads_no_further_and_leaves_lets_everything_go() -> None:
    source, connection = Source(b"a", b"b", b"c"), Connection(reads=1)
    await run(source, connection)
    assert sorted(source.closed) == ["generator", "work"]
    assert len(connection.sent) == 2
    assert connection.record.error == "client_gone"


async def test_work_is_let_go_even_if_no_event_was_asked_for() -> None:
    source, connection = Source(b"a"), Connection(reads=0)
    await run(source, connection)
    assert source.closed == ["work"]


async def test_a_known_fault_is_an_event_of_its_own() -> None:
    source, connection = Source(b"a", failure=GenerationFailed("a non-finite logit")), Connection()
    await run(source, connection)
    event, _, data = connection.body.removeprefix(b"a").partition(b"\n")
    assert event == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == "a non-finite logit"
    assert connection.record.error == "generation_failed"
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_an_unknown_fault_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    source, connection = Source(b"a", failure=ZeroDivisionError("secret")), Connection()
    with caplog.at_level(logging.ERROR):
        await run(source, connection)
    assert b"internal_error" in connection.body
    assert b"secret" not in connection.body
    assert "secret" in caplog.text


async def test_work_ends_with_its_client() -> None:
    connection, ended = Connection(), []

    async def work() -> None:
        try:
            connection.left.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(ClientGone):
        await until_gone(Request(connection.scope, connection.receive), work())
    assert ended == [True]


async def test_work_that_is_done_is_not_disturbed_by_a_leaving_client() -> None:
    connection = Connection()

    async def work() -> int:
        return 5

    assert await until_gone(Request(connection.scope, connection.receive), work()) == 5
