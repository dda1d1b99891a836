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
from service.errors import ClientGone, GenerationFailed, Overloaded
from service.logs import RequestRecord

LIFE = b": keep-alive\n\n"
SIGN = {"type": "http.response.body", "body": LIFE, "more_body": True}


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


class Listener(Connection):
    """A client that hears signs of life; `heard` is set by the second one since it was last cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = asyncio.Event()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.sent[-2:] == [SIGN, SIGN]:
            self.heard.set()

    @property
    def kinds(self) -> list[bytes | int]:
        """What came in which order, signs of life told once however many there were in a row."""
        told = [message.get("status") or message["body"] for message in self.sent]
        return [kind for kind, before in zip(told, [None, *told], strict=False) if (kind, before) != (LIFE, LIFE)]


class Source:
    """Events, and what is waited for before the next; somebody wants to know that they have been let go."""

    def __init__(self, *events: bytes | asyncio.Event, failure: Exception | None = None) -> None:
        self.closed: list[str] = []
        self._events, self._failure = events, failure

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self._events:
                if isinstance(event, bytes):
                    yield event
                else:
                    await event.wait()
                    event.clear()
            if self._failure is not None:
                raise self._failure
        finally:
            self.closed.append("generator")

    def stream(self, quiet_seconds: float) -> EventStream:
        return EventStream(self(), quiet_seconds=quiet_seconds, on_close=lambda: self.closed.append("work"))


async def run(source: Source, connection: Connection, *, quiet_seconds: float = 0) -> None:
    async with asyncio.timeout(10):
        await source.stream(quiet_seconds)(connection.scope, connection.receive, connection.send)


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


async def test_a_client_that_takes_not_even_the_status_lets_everything_go() -> None:
    source, connection = Source(b"a"), Connection(reads=0)
    await run(source, connection)
    assert sorted(source.closed) == ["generator", "work"]


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


async def test_a_fault_before_the_first_event_has_a_status_of_its_own() -> None:
    source, connection = Source(failure=Overloaded("the queue is full", retry_after=3)), Connection()
    await run(source, connection, quiet_seconds=60)
    start, body = connection.sent
    assert start["status"] == 429
    assert (b"retry-after", b"3") in start["headers"]
    assert json.loads(body["body"])["error"]["message"] == "the queue is full"
    assert connection.record.error == "overloaded"
    assert sorted(source.closed) == ["generator", "work"]


async def test_an_unknown_fault_before_the_first_event_is_left_to_the_outermost_layer() -> None:
    source, connection = Source(failure=ZeroDivisionError("secret")), Connection()
    with pytest.raises(ZeroDivisionError):
        await run(source, connection, quiet_seconds=60)
    assert connection.sent == []
    assert sorted(source.closed) == ["generator", "work"]


async def test_a_stream_that_has_nothing_to_say_gives_signs_of_life() -> None:
    connection = Listener()
    await run(Source(b"a", connection.heard, b"b", connection.heard), connection, quiet_seconds=0.001)
    assert [kind for kind in connection.kinds if kind != LIFE] == [200, b"a", b"b", b""]
    assert connection.kinds.count(LIFE) >= 2
    assert connection.sent[-1]["more_body"] is False


async def test_signs_of_life_come_before_the_first_event_too_and_bring_the_status() -> None:
    connection = Listener()
    await run(Source(connection.heard, b"a"), connection, quiet_seconds=0.001)
    assert connection.kinds[:3] == [200, LIFE, b"a"]
    assert connection.kinds[-1] == b""


async def test_a_fault_after_a_sign_of_life_is_an_event() -> None:
    connection = Listener()
    await run(Source(connection.heard, failure=Overloaded("full")), connection, quiet_seconds=0.001)
    assert connection.kinds[:2] == [200, LIFE]
    assert b"event: error\ndata: " in connection.body
    assert connection.record.error == "overloaded"


@pytest.mark.parametrize("failure", [None, Overloaded("full")])
async def test_what_comes_while_a_sign_brings_the_status_follows_it(failure: Exception | None) -> None:
    """The connection takes no more for a moment, just when status and headers go out."""
    comes = asyncio.Event()

    class Congested(Connection):
        async def send(self, message: Any) -> None:
            if message["type"] == "http.response.start":
                comes.set()
                for _ in range(20):
                    await asyncio.sleep(0)
                assert not comes.is_set(), "what came has gone on its way"
            await super().send(message)

    connection = Congested()
    source = Source(comes, *([] if failure else [b"a"]), failure=failure)
    await run(source, connection, quiet_seconds=0.001)
    assert [message.get("status") for message in connection.sent].count(200) == 1
    assert connection.sent[0]["type"] == "http.response.start"
    assert connection.body.replace(LIFE, b"").startswith(b"a" if failure is None else b"event: error")
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_client_that_leaves_a_silent_stream_lets_everything_go() -> None:
    connection = Listener()

    async def leave() -> None:
        await connection.heard.wait()
        connection.left.set()

    source = Source(asyncio.Event())
    leaving = asyncio.ensure_future(leave())
    await run(source, connection, quiet_seconds=0.001)
    await leaving
    assert sorted(source.closed) == ["generator", "work"]
    assert connection.record.error == "client_gone"


@pytest.mark.parametrize("quiet_seconds", [0, 60])
async def test_events_that_flow_cost_no_task_each_and_hear_no_signs(quiet_seconds: float) -> None:
    most = 0

    class Counting(Connection):
        async def send(self, message: Any) -> None:
            nonlocal most
            most = max(most, len(asyncio.all_tasks()))
            await super().send(message)

    connection, before = Counting(), len(asyncio.all_tasks())
    await run(Source(*[b"a"] * 1000), connection, quiet_seconds=quiet_seconds)
    assert connection.body == b"a" * 1000
    assert most <= before + 3


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
