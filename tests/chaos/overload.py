"""An open loop at ten times what the service can do: goodput stays, the rest is refused soon and with a usable time.

The capacity is what a closed loop gets through; goodput is what whole answers come to while the storm lasts.
"""

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.law import Row, check_books, growth_texts
from tests.chaos.service import running
from tests.chaos.wire import Wire, get, post
from tests.chaos.work import body_of

SECONDS = 60.0
TOKENS = 50
FACTOR = 10
QUEUE = 64
MIN_GOODPUT = 0.95
MAX_REFUSAL_SECONDS = 0.05
MAX_PROBE_SECONDS = 0.1
MAX_GROWTH = 0.02
CALM_SECONDS = 5.0
CAPACITY_ROUNDS = 4
WARM_UP_SECONDS = 5.0


@dataclass(slots=True)
class Storm:
    """What became of it; times in seconds."""

    ended: list[float] = field(default_factory=list)
    """When each whole answer had arrived, since the storm began."""
    refusals: list[float] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)


async def overload(options: argparse.Namespace, log: Path) -> Row:
    seconds = options.count or SECONDS
    row = Row(f"open loop at {FACTOR} times capacity for {seconds:g} s")
    async with running(log, "--max-queue-requests", str(QUEUE)) as service:
        wire = Wire(service.port)
        await _capacity(wire, options.streams)
        calm = await _latency(wire)
        capacity = await _capacity(wire, options.streams)
        await _rage(wire, capacity * FACTOR, WARM_UP_SECONDS)  # what grows with use has grown
        before = service.rss_bytes()
        storm = await _rage(wire, capacity * FACTOR, seconds)
        after_storm = time.perf_counter()
        while await _latency(wire) > 2 * calm and time.perf_counter() - after_storm < 30:
            pass
        calmed = time.perf_counter() - after_storm
        goodput = sum(ended <= seconds for ended in storm.ended) / seconds
        refused = statistics.median(storm.refusals or [0.0])
        row.found += [
            f"goodput {goodput:.1f}/s of {capacity:.1f}/s ({goodput / capacity:.0%})",
            f"{len(storm.ended):,} served, {len(storm.refusals):,} refused after {1000 * refused:.0f} ms (median)",
            f"probes {1000 * statistics.median(storm.probes):.0f} ms (median), "
            f"{1000 * max(storm.probes):.0f} ms at most",
            *growth_texts(row, before, service.rss_bytes(), MAX_GROWTH),
            f"latency as before after {calmed:.1f} s",
        ]
        row.check(storm.statuses <= {200, 429}, f"answers {sorted(storm.statuses)}")
        row.check(goodput >= MIN_GOODPUT * capacity, f"goodput below {MIN_GOODPUT:.0%}")
        row.check(refused <= MAX_REFUSAL_SECONDS, "refusals were slow")
        row.check(all(wait.isdigit() and int(wait) > 0 for wait in storm.waits), "a refusal without Retry-After")
        row.check(max(storm.probes) <= MAX_PROBE_SECONDS, "a probe was slow")
        row.check(calmed <= CALM_SECONDS, "latency did not come back")
        await check_books(service, row)
    return row


async def _capacity(wire: Wire, num_callers: int) -> float:
    """Requests a second of a closed loop."""
    began = time.perf_counter()

    async def call(caller: int) -> None:
        for turn in range(CAPACITY_ROUNDS):
            answer = await wire.ask(_completion(caller + 1000 * turn, TOKENS))
            assert answer.status == 200, answer

    await asyncio.gather(*(call(caller) for caller in range(num_callers)))
    return CAPACITY_ROUNDS * num_callers / (time.perf_counter() - began)


async def _latency(wire: Wire) -> float:
    return (await wire.ask(_completion(0, 10))).seconds


def _completion(number: int, max_tokens: int) -> bytes:
    return post("/v1/completions", body_of(number, max_tokens))


async def _rage(wire: Wire, per_second: float, seconds: float) -> Storm:
    """Sends at a constant rate, whatever comes back, and waits for all answers."""
    storm = Storm()
    began = time.perf_counter()

    async def one(number: int) -> None:
        answer = await wire.ask(_completion(number, TOKENS))
        storm.statuses.add(answer.status)
        if answer.status == 429:
            storm.refusals.append(answer.seconds)
            storm.waits.append(answer.headers.get("retry-after", ""))
        elif answer.status == 200:
            storm.ended.append(time.perf_counter() - began)

    prober = asyncio.create_task(_probe(wire, storm))
    tasks: list[asyncio.Task[None]] = []
    while (elapsed := time.perf_counter() - began) < seconds:
        while len(tasks) < elapsed * per_second:
            tasks.append(asyncio.create_task(one(len(tasks))))
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    prober.cancel()
    return storm


async def _probe(wire: Wire, storm: Storm) -> None:
    while True:
        for path in ("/livez", "/readyz"):
            answer = await wire.ask(get(path))
            storm.probes.append(answer.seconds)
            storm.statuses.add(answer.status)
        await asyncio.sleep(0.1)
