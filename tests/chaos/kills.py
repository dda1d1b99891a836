"""The worker is killed and stopped at random moments: no request fails, and each text is that of an undisturbed run."""

import argparse
import asyncio
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.law import Row, check_books
from tests.chaos.service import Service, Stream, running
from tests.chaos.work import SINGLE_PASS, stream_all

KILLS, STOPS = 20, 5
TOKENS = 200
MAX_PAUSE = 0.5
"""Between the worker's being ready and the next fault, of the time that the undisturbed run took."""
SAME = 1e-4
"""How far a number of a single-pass answer may be from the one of the undisturbed run: batches round differently."""


async def kills(options: argparse.Namespace, log: Path) -> Row:
    num_kills = KILLS if options.count is None else options.count
    num_stops = STOPS if options.count is None else max(1, options.count // 4)
    row = Row(
        f"worker killed {num_kills} times and stopped {num_stops} times under {options.streams} streams, embeddings, "
        "classification"
    )
    chance = random.Random(options.seed)
    faults = [signal.SIGKILL] * num_kills + [signal.SIGSTOP] * num_stops
    chance.shuffle(faults)
    async with running(log, "--restart-budget", "1000", "--step-timeout", str(options.step_timeout)) as service:
        began = time.perf_counter()
        undisturbed = [stream.text for stream in await stream_all(service, options.streams, TOKENS)]
        max_pause = MAX_PAUSE * (time.perf_counter() - began)
        answers = [await _ask(service, number) for number in range(len(SINGLE_PASS))]
        streams: list[Stream] = []
        recoveries: list[float] = []
        num_asked = 0
        while faults:
            work = asyncio.ensure_future(stream_all(service, options.streams, TOKENS))
            beside = asyncio.ensure_future(_keep_asking(service, work, answers, row))
            while faults and not work.done():
                await asyncio.sleep(chance.uniform(0.05, max_pause))
                if work.done() or (worker := service.worker) is None:
                    break
                recoveries.append(await _strike(service, worker, faults.pop()))
            streams += await work
            num_asked += await beside
            row.check([stream.text for stream in streams[-options.streams :]] == undisturbed, "a text differs")
        metrics = await service.metrics()
        row.found += [
            f"{len(streams):,} streams, {num_asked:,} single-pass requests, "
            f"{int(metrics['requests_replayed_total']):,} replays",
            f"ready again after {statistics.median(recoveries):.2f} s (median), {max(recoveries):.2f} s at most",
            f"largest gap in a stream {max(stream.largest_gap for stream in streams):.2f} s",
        ]
        row.check(all(stream.complete for stream in streams), "a stream failed")
        row.check(metrics["worker_restarts_total"] == num_kills + num_stops, "restarts were not counted right")
        await check_books(service, row)
    return row


async def _strike(service: Service, worker: psutil.Process, number: signal.Signals) -> float:
    """Seconds from the signal until another worker is ready."""
    count = "worker_restarts_total"
    before = (await service.metrics()).get(count, 0)
    began = time.perf_counter()
    worker.send_signal(number)
    while (await service.metrics()).get(count, 0) == before:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await service.until_ready()
    return time.perf_counter() - began


async def _keep_asking(service: Service, work: "asyncio.Future[Any]", answers: list[Any], row: Row) -> int:
    """Single-pass requests, four at a time, until the streams have ended."""
    num_asked = 0
    while not work.done():
        found = await asyncio.gather(*(_ask(service, number) for number in range(len(SINGLE_PASS))))
        num_asked += len(found)
        for number, answer in enumerate(found):
            row.check(_is_same(answer, answers[number]), f"{SINGLE_PASS[number][0]} failed or answered otherwise")
    return num_asked


async def _ask(service: Service, number: int) -> Any:
    path, body = SINGLE_PASS[number]
    response = await service.client.post(path, json=body)
    return response.json() if response.status_code == 200 else response.status_code


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(key == "id" or _is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= SAME
    return bool(one == other)
