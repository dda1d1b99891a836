"""Raw hostile requests by the ten thousand: no answer is a 5xx, none that is owed stays away, nothing grows.

What cannot be framed (half a request, say) is owed no answer; its client leaves after a moment.
"""

import argparse
import asyncio
import math
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httptools

from tests.chaos.law import Row, check_books, growth_texts
from tests.chaos.mutations import Wrong, make_wrong
from tests.chaos.service import Service, running

COUNT = 100_000
CALLERS = 24
ANSWER_SECONDS = 620.0
"""No request may last longer than the service's --max-request-timeout, 600 seconds; some ask for that much."""
UNFRAMED_SECONDS = 0.1
MAX_GROWTH = 0.02


@dataclass(slots=True)
class Found:
    statuses: Counter[int] = field(default_factory=Counter)
    server_faults: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    """Status, request, answer."""
    silent: list[bytes] = field(default_factory=list)
    """Requests whose answer was owed and did not come."""
    num_unanswered: int = 0
    slowest_seconds: float = 0.0


class _Answer:
    """Whole when httptools says so."""

    def __init__(self) -> None:
        self.whole = False
        self.parser = httptools.HttpResponseParser(self)

    def on_message_complete(self) -> None:
        self.whole = True


class Caller:
    """Sends one wrong request after the other, on one connection for as long as the server keeps it."""

    def __init__(self, port: int, address: str, found: Found) -> None:
        self._port, self._address, self._found = port, address, found
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, wrong: Wrong) -> None:
        reader, writer = self._streams or await self._connect()
        began = time.perf_counter()
        writer.write(wrong.data)
        received = bytearray()
        limit = ANSWER_SECONDS if wrong.is_framed else UNFRAMED_SECONDS
        answer = _Answer()
        try:
            async with asyncio.timeout(limit):
                while not answer.whole and (data := await reader.read(65536)):
                    received += data
                    answer.parser.feed_data(data)
        except TimeoutError:
            if wrong.is_framed:
                self._found.silent.append(wrong.data[:3000])
        except (ConnectionError, httptools.HttpParserError):
            pass
        self._note(wrong, bytes(received), time.perf_counter() - began)
        if not wrong.is_framed or not answer.whole or not answer.parser.should_keep_alive():
            self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._streams = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._address, 0))
        return self._streams

    def _note(self, wrong: Wrong, received: bytes, seconds: float) -> None:
        found = self._found
        statuses = [int(text) for text in re.findall(rb"^HTTP/1\.[01] (\d{3})", received, re.MULTILINE)]
        found.statuses.update(statuses)
        found.num_unanswered += not statuses
        if wrong.is_framed:
            found.slowest_seconds = max(found.slowest_seconds, seconds)
        for status in statuses:
            if status >= 500 and not (status == 504 and (wrong.may_expire or b"timeout" in wrong.data.lower())):
                found.server_faults.append((status, wrong.data[:3000], received[:1000]))


async def fuzz(options: argparse.Namespace, log: Path) -> Row:
    count = options.count or COUNT
    row = Row(f"{count:,} mutated raw requests on {CALLERS} connections")
    found = Found()
    async with running(log, "--kv-cache-memory", "64MiB", "--offline") as service:
        sizes = [await _send(service, options.seed + part, math.ceil(count / 4), found) for part in range(4)]
        row.found += [
            ", ".join(f"{number:,} answered {status}" for status, number in sorted(found.statuses.items())),
            f"slowest answer {found.slowest_seconds:.1f} s",
            *growth_texts(row, sizes[1], sizes[-1], MAX_GROWTH),
        ]
        row.check(not found.server_faults, f"{len(found.server_faults)} answers were 5xx")
        row.check(not found.silent, f"{len(found.silent)} answers did not come")
        row.check((await service.metrics()).get("worker_restarts_total", 0) == 0, "the worker died")
        await check_books(service, row)
    if options.logs:
        lines = [f"silent\n{sent!r}\n" for sent in found.silent]
        lines += [f"{status}\n{sent!r}\n{answer!r}\n" for status, sent, answer in found.server_faults]
        (options.logs / "fuzz-faults.txt").write_text("\n".join(lines))
    return row


async def _send(service: Service, seed: int, count: int, found: Found) -> tuple[int, int]:
    """The memory of both processes afterwards."""
    chance = random.Random(seed)

    async def call(number: int) -> None:
        # An address of its own for each caller: closed connections keep their ports for a minute.
        caller = Caller(service.port, f"127.0.1.{number + 1}", found)
        for _ in range(math.ceil(count / CALLERS)):
            await caller.send(make_wrong(chance))
        caller.close()

    await asyncio.gather(*(call(number) for number in range(CALLERS)))
    await service.until_idle()
    return service.rss_bytes()
