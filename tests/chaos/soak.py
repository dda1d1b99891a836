"""Mixed requests by the ten thousand, some cancelled and some left: memory flat, and nothing of them stays behind."""

import argparse
import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.chaos.law import Row, check_books, growth_texts
from tests.chaos.service import Service, running
from tests.chaos.work import ask_single_pass, body_of

COUNT = 50_000
CALLERS = 32
PARTS = 8
MAX_GROWTH = 0.02
SPARE = 2
"""Tasks, threads and descriptors that may come and go: of a pool that grows with its use, of a probe under way."""


async def soak(options: argparse.Namespace, log: Path) -> Row:
    count = options.count or COUNT
    row = Row(f"{count:,} mixed requests, every fourth left by its client or past its deadline")
    chance = random.Random(options.seed)
    sizes: list[tuple[int, int]] = []
    held: list[dict[str, int]] = []
    async with running(log, "--kv-cache-memory", "32MiB") as service:
        for part in range(PARTS):
            numbers = iter(range(part * count // PARTS, (part + 1) * count // PARTS))
            await asyncio.gather(*(_call(service, numbers, chance, row) for _ in range(CALLERS)))
            await service.until_idle()
            sizes.append(service.rss_bytes())
            held.append(await _held(service))
        middle = PARTS // 2 - 1
        row.found += growth_texts(row, sizes[middle], sizes[-1], MAX_GROWTH)
        row.found.append(", ".join(f"{held[middle][name]} and then {last} {name}" for name, last in held[-1].items()))
        for name, last in held[-1].items():
            row.check(last <= held[middle][name] + SPARE, f"{name} are left")
        await check_books(service, row)
    return row


async def _held(service: Service) -> dict[str, int]:
    worker = service.worker
    assert worker is not None, "the worker is down"
    processes = {"of the API process": psutil.Process(service.process.pid), "of the worker": worker}
    found = {"tasks of the API process": int((await service.metrics())["event_loop_tasks"])}
    for name, process in processes.items():
        found[f"threads {name}"] = process.num_threads()
        # The clients' own connections stay open between parts; what is counted is what else there is.
        found[f"descriptors {name}"] = process.num_fds() - len(process.net_connections("tcp"))
    return found


async def _call(service: Service, numbers: Iterator[int], chance: random.Random, row: Row) -> None:
    for number in numbers:
        match number % 8:
            case 0:
                await _leave(service, number, chance.randrange(1, 8))
            case 1:
                await _be_late(service, number, row)
            case 2 | 3:
                stream = await service.stream(**body_of(number, 12))
                row.check(stream.complete, f"a stream failed: {stream.status} {stream.error}")
            case _:
                fault = await ask_single_pass(service, number // 8 + number)
                row.check(not fault, fault)


async def _leave(service: Service, number: int, num_lines: int) -> None:
    """Reads a few lines of a long stream and closes the connection."""
    body = {**body_of(number, 400), "stream": True}
    async with service.client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_lines():
            num_lines -= 1
            if num_lines <= 0:
                break


async def _be_late(service: Service, number: int, row: Row) -> None:
    response = await service.client.post("/v1/completions", json=body_of(number, 400) | {"timeout": 0.02})
    row.check(response.status_code in (200, 504), f"a late request was answered {response.status_code}")
