"""Which writes of an answer leave together, and that none is lost or waits for long."""

import asyncio
from typing import cast

import pytest

from service.http.joined_writes import JoinedWrites

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Transport:
    """Notes what is sent at once."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        self.sent.append(b"".join(parts))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
async def joined() -> tuple[JoinedWrites, Transport]:
    transport = Transport()
    return JoinedWrites(cast(asyncio.Transport, transport), asyncio.get_running_loop()), transport


async def test_a_head_leaves_with_its_body_and_what_follows_by_itself(joined) -> None:
    writes, transport = joined
    for data in (HEAD, b"ab", b"cd"):
        writes.write(data)
    await asyncio.sleep(0)
    assert transport.sent == [HEAD + b"ab", b"cd"]


async def test_a_head_without_a_body_leaves_in_the_same_turn_of_the_loop(joined) -> None:
    writes, transport = joined
    writes.write(HEAD)
    assert transport.sent == []
    await asyncio.sleep(0)
    assert transport.sent == [HEAD]
    writes.write(b"later")
    assert transport.sent == [HEAD, b"later"]


async def test_answers_one_after_another_keep_their_order(joined) -> None:
    writes, transport = joined
    writes.write(HEAD)
    writes.write(HEAD + b"again")
    await asyncio.sleep(0)
    assert b"".join(transport.sent) == HEAD + HEAD + b"again"


async def test_closing_sends_what_waits_first(joined) -> None:
    writes, transport = joined
    writes.write(HEAD)
    writes.close()
    assert (transport.sent, transport.closed) == ([HEAD], True)


async def test_nothing_is_written_to_a_connection_that_has_ended_meanwhile(joined) -> None:
    writes, transport = joined
    writes.write(HEAD)
    transport.close()
    await asyncio.sleep(0)
    assert transport.sent == []
