"""An open loop at ten times what the service can do: goodput stays, the rest is refused soon and with a usable time.

The capacity is what a closed loop gets through, goodput what whole answers come to in a storm. Storms and closed loops
take turns, so that a machine that is now faster and now slower is so for both. Answers differ in length: of one length
they would end in waves of a whole batch, and one wave more or less would be the result.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

from tests.chaos.law import Row, check_books, growth_texts
from tests.chaos.service import running
from tests.chaos.wire import Wire, get, post
from tests.chaos.work import body_of

SECONDS = 60.0
STORMS = 4
CAPACITY_SECONDS = 10.0
RAMP_SECONDS = 3.0
"""Of either, until as many answers end as begin."""
FEWEST_TOKENS = 25
MOST_TOKENS = 75
FACTOR = 10
QUEUE = 64
CALLERS = 160
"""Of the closed loop: a whole batch, and some in line."""
MIN_GOODPUT = 0.95
MAX_REFUSAL_SECONDS = 0.05
MAX_PROBE_SECONDS = 0.1
MAX_GROWTH = 0.02
CALM_SECONDS = 5.0
WARM_UP_SECONDS = 5.0


@dataclass(slots=True)
class Storm:
    """What became of it; times in seconds."""

    ended: list[tuple[float, int]] = field(default_factory=list)
    """When each whole answer had arrived, since the storm began, and its tokens."""
    refusals: list[float] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)

    def add(self, other: "Storm") -> None:
        self.ended += other.ended
        self.refusals += other.refusals
        self.waits += other.waits
        self.probes += other.probes
        self.statuses |= other.statuses


async def overload(options: argparse.Namespace, log: Path) -> Row:
    seconds = max((options.count or SECONDS) / STORMS, 2 * RAMP_SECONDS)
    row = Row(f"open loop at {FACTOR} times capacity, {STORMS} times for {seconds:g} s")
    async with running(log, "--max-queue-requests", str(QUEUE)) as service:
        wire = Wire(service.port)
        await _capacity(wire, CALLERS)
        calm = await _latency(wire)
        capacities = [await _capacity(wire, CALLERS)]
        await _rage(wire, capacities[0] * FACTOR, WARM_UP_SECONDS)  # what grows with use has grown
        before = service.rss_bytes()
        storm = Storm()
        goodputs, calmed = [], 0.0
        for _ in range(STORMS):
            part = await _rage(wire, capacities[-1] * FACTOR, seconds)
            goodputs.append(_rate(part.ended, seconds))
            storm.add(part)
            after_storm = time.perf_counter()
            while await _latency(wire) > 2 * calm and time.perf_counter() - after_storm < 30:
                pass
            calmed = max(calmed, time.perf_counter() - after_storm)
            capacities.append(await _capacity(wire, CALLERS))
        beside = [statistics.mean(pair) for pair in pairwise(capacities)]
        share = statistics.median(goodput / capacity for goodput, capacity in zip(goodputs, beside, strict=True))
        refused = statistics.median(storm.refusals or [0.0])
        row.found += [
            f"goodput {statistics.median(goodputs):.1f}/s of {statistics.median(beside):.1f}/s ({share:.0%})",
            f"{len(storm.ended):,} served, {len(storm.refusals):,} refused after {1000 * refused:.0f} ms (median)",
            f"probes {1000 * statistics.median(storm.probes):.0f} ms (median), "
            f"{1000 * max(storm.probes):.0f} ms at most",
            *growth_texts(row, before, service.rss_bytes(), MAX_GROWTH),
            f"latency as before after {calmed:.1f} s",
        ]
        row.check(storm.statuses <= {200, 429}, f"answers {sorted(storm.statuses)}")
        row.check(share >= MIN_GOODPUT, f"goodput below {MIN_GOODPUT:.0%}")
        row.check(refused <= MAX_REFUSAL_SECONDS, "refusals were slow")
        row.check(all(wait.isdigit() and int(wait) > 0 for wait in storm.waits), "a refusal without Retry-After")
        row.check(max(storm.probes) <= MAX_PROBE_SECONDS, "a probe was slow")
        row.check(calmed <= CALM_SECONDS, "latency did not come back")
        await check_books(service, row)
    return row


async def _capacity(wire: Wire, num_callers: int) -> float:
    """Requests a second of a closed loop."""
    began = time.perf_counter()
    ended: list[tuple[float, int]] = []

    async def call(caller: int) -> None:
        for turn in count():
            answer = await wire.ask(_completion(caller + num_callers * turn))
            assert answer.status == 200, answer
            elapsed = time.perf_counter() - began
            ended.append((elapsed, _num_tokens(caller + num_callers * turn)))
            if elapsed > CAPACITY_SECONDS:
                return

    await asyncio.gather(*(call(caller) for caller in range(num_callers)))
    return _rate(ended, CAPACITY_SECONDS)


def _rate(ended: Sequence[tuple[float, int]], seconds: float) -> float:
    """Answers of the mean length a second, once it has got going."""
    num_tokens = sum(tokens for moment, tokens in ended if RAMP_SECONDS < moment <= seconds)
    return 2 * num_tokens / (FEWEST_TOKENS + MOST_TOKENS) / (seconds - RAMP_SECONDS)


async def _latency(wire: Wire) -> float:
    return (await wire.ask(post("/v1/completions", body_of(0, 10)))).seconds


def _completion(number: int) -> bytes:
    return post("/v1/completions", body_of(number, _num_tokens(number)))


def _num_tokens(number: int) -> int:
    return FEWEST_TOKENS + number % (MOST_TOKENS - FEWEST_TOKENS + 1)


async def _rage(wire: Wire, per_second: float, seconds: float) -> Storm:
    """Sends at a constant rate, whatever comes back, and waits for all answers."""
    storm = Storm()
    began = time.perf_counter()

    async def one(number: int) -> None:
        answer = await wire.ask(_completion(number))
        storm.statuses.add(answer.status)
        if answer.status == 429:
            storm.refusals.append(answer.seconds)
            storm.waits.append(answer.headers.get("retry-after", ""))
        elif answer.status == 200:
            storm.ended.append((time.perf_counter() - began, _num_tokens(number)))

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
