"""SIGTERM under load: what was accepted ends whole, what comes later is sent elsewhere, the exit code is 0."""

import argparse
import asyncio
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.law import Row, add_books
from tests.chaos.service import Service, running
from tests.chaos.work import SINGLE_PASS, body_of

COUNT = 20
TOKENS = 100
MAX_UNREADY_SECONDS = 0.1
LONG_TEXT = "The little dog ran home. It was late, and the rain had begun. " * 60
OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    *SINGLE_PASS,
    # Pieces of the text are written about one after the other, and then what was written about them.
    ("/v1/summarize", {"model": "lm", "input": LONG_TEXT, "method": "abstractive", "max_tokens": 60}),
)


async def drains(options: argparse.Namespace, log: Path) -> Row:
    count = options.count or COUNT
    row = Row(f"SIGTERM under {options.streams} streams, single-pass requests and long summaries, {count} times")
    chance = random.Random(options.seed)
    unready: list[float] = []
    total: Counter[int] = Counter()
    books: Counter[str] = Counter()
    for _ in range(count):
        async with running(log, "--drain-timeout", "300") as service:
            callers = [asyncio.create_task(_stream_on(service, number, row)) for number in range(options.streams)]
            callers += [asyncio.create_task(_ask_on(service, number, row)) for number in range(len(OTHERS))]
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            unready.append(await _terminate(service))
            statuses = sum(await asyncio.gather(*callers), Counter())
            code = await asyncio.to_thread(service.process.wait, 60)
        row.check(code == 0, f"exit code {code}")
        logged = _logged_statuses(log)
        row.check(statuses == logged, f"clients got {dict(statuses)}, the service says {dict(logged)}")
        books += _closed_books(log)
        total += statuses
    row.found += [
        ", ".join(f"{number:,} requests {'whole' if status == 200 else status}" for status, number in total.items()),
        f"not ready after {max(unready) * 1000:.0f} ms at most",
    ]
    add_books(row, books.pop("accepted", 0), books)
    row.check(set(total) <= {200, 503}, "an answer was neither whole nor a 503")
    row.check(max(unready) <= MAX_UNREADY_SECONDS, "readiness was told too late")
    return row


async def _terminate(service: Service) -> float:
    """Seconds from the signal until the service says that it is not ready."""
    began = time.perf_counter()
    service.process.send_signal(signal.SIGTERM)
    while await service.is_ready():  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    return time.perf_counter() - began


async def _stream_on(service: Service, number: int, row: Row) -> "Counter[int]":
    """One stream after the other until the service takes no more; whole ones by their status."""
    statuses: Counter[int] = Counter()
    while True:
        stream = await service.stream(**body_of(number, TOKENS))
        if stream.status == 0:
            return statuses  # never taken in: it would be among those that the service has logged
        row.check(stream.complete or stream.status == 503, f"an accepted stream was lost: {stream.error}")
        statuses[stream.status] += 1
        if stream.status == 503:
            await asyncio.sleep(0.05)


async def _ask_on(service: Service, number: int, row: Row) -> "Counter[int]":
    statuses: Counter[int] = Counter()
    path, body = OTHERS[number]
    while True:
        try:
            response = await service.client.post(path, json=body)
        except httpx.TransportError:
            return statuses
        statuses[response.status_code] += 1
        if response.status_code == 503:
            row.check(response.headers.get("retry-after", "").isdigit(), "a 503 without a usable Retry-After")
            await asyncio.sleep(0.05)


def _logged_statuses(log: Path) -> "Counter[int]":
    """What the service itself says that it answered, probes left out."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"method": "POST"' in line]
    return Counter(line["status"] for line in lines)


def _closed_books(log: Path) -> "Counter[str]":
    """Accepted requests, and how they ended, as the service told at its end."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"books closed"' in line]
    return Counter({name: value for line in lines for name, value in line.items() if isinstance(value, int)})
