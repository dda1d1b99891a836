"""Faulty clients: idle connections, bodies that stop half way, readers that stop reading. The others do not notice."""

import argparse
import asyncio
import json
import socket
import statistics
import time
from pathlib import Path

from tests.chaos.law import Row, check_books
from tests.chaos.service import Service, running
from tests.chaos.work import body_of

IDLE, HALF, STOPPED = 500, 100, 20
ROUNDS = 30
MAX_SLOWER = 1.5
MAX_GROWTH_BYTES = 64 << 20
STREAM_TOKENS = 480


async def clients(options: argparse.Namespace, log: Path) -> Row:
    row = Row(f"{IDLE} idle connections, {HALF} half-sent bodies, {STOPPED} readers that stop")
    patience = [part for name in ("header", "keep-alive", "body") for part in (f"--{name}-timeout", "300")]
    rounds = options.count or ROUNDS
    async with running(log, *patience) as service:
        await _latencies(service, rounds)
        calm = await _latencies(service, rounds)
        before = service.rss_bytes()
        faulty = await _open(service)
        while (await service.metrics())["requests_accepted_total"] < 2 * rounds + STOPPED:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await service.until_idle()  # the stopped readers' own requests have ended, unread
        beside = await _latencies(service, rounds)
        growth = [last - first for first, last in zip(before, service.rss_bytes(), strict=True)]
        row.found += [
            f"others' latency {1000 * calm:.0f} ms before and {1000 * beside:.0f} ms beside them (median)",
            f"memory {growth[0] / 2**20:+.0f} MiB (API process), {growth[1] / 2**20:+.0f} MiB (worker)",
        ]
        row.check(beside <= MAX_SLOWER * calm, "others waited for them")
        row.check(sum(growth) <= MAX_GROWTH_BYTES, "they take memory")
        for connection in faulty:
            connection.close()
        await check_books(service, row)
    return row


async def _latencies(service: Service, rounds: int) -> float:
    """Median seconds of a short completion."""
    found: list[float] = []
    for number in range(rounds):
        began = time.perf_counter()
        stream = await service.stream(**body_of(number, 20))
        assert stream.complete, stream.error
        found.append(time.perf_counter() - began)
    return statistics.median(found)


async def _open(service: Service) -> list[socket.socket]:
    found = []
    for number in range(IDLE + HALF + STOPPED):
        connection = socket.socket()
        found.append(connection)
        if number >= IDLE + HALF:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await asyncio.to_thread(connection.connect, ("127.0.0.1", service.port))
        if number >= IDLE:
            body = json.dumps({**body_of(number, STREAM_TOKENS), "stream": True, "logprobs": 5}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}"
            sent = body if number >= IDLE + HALF else body[: len(body) // 2]
            connection.sendall(f"{head}\r\n\r\n".encode() + sent)
    return found
