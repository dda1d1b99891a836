"""`make chaos`: faults injected for real under load, and what came of it as a table; `--write`: into the README.

Kills and stops the worker at random moments, ends the service under load, overloads it, lets clients leave. Each run
checks its law and the metrics' sums, and the exit code tells whether all held. Needs the stories260K checkpoint.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.service import ROOT, STORIES, Service, Stream, running

README = ROOT / "README.md"
BEGIN, END = "<!-- chaos -->\n", "<!-- /chaos -->"
MODEL = [f"{STORIES}=stories"]
PROMPTS = (
    "Once upon a time",
    "Lily and Tom went to the park",
    "The little dog",
    "One day, a girl named Mia",
    "Tim had",
)


@dataclass(slots=True)
class Row:
    """One run: what was done, what was found, whether its law held."""

    what: str
    found: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def __str__(self) -> str:
        verdict = "held" if not self.faults else f"**broken**: {'; '.join(self.faults)}"
        return f"| {self.what} | {'; '.join(self.found)} | {verdict} |"


def body_of(number: int, max_tokens: int) -> dict[str, Any]:
    """Every second stream is greedy, the others are sampled with a seed of their own; none ends early."""
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number} if number % 2 else {}
    prompt = f"{PROMPTS[number % len(PROMPTS)]}{' and' * (number % 7)}"
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **sampled}


async def stream_all(service: Service, options: argparse.Namespace, max_tokens: int) -> list[Stream]:
    return await asyncio.gather(*(service.stream(**body_of(number, max_tokens)) for number in range(options.streams)))


async def check_books(service: Service, row: Row) -> None:
    """Accepted = ended, to the unit, and nothing left running."""
    metrics = await service.metrics()
    accepted, ended = metrics.get("requests_accepted_total", 0), metrics.get("request_outcomes_total", 0)
    causes = ", ".join(
        f"{int(value)} {name[6:]}" for name, value in metrics.items() if name.startswith("ended_") and value
    )
    row.found.append(f"{int(accepted):,} accepted = {causes}")
    row.check(accepted == ended, f"{accepted:g} accepted and {ended:g} ended")
    row.check(metrics.get("requests_running", 0) == 0, "requests are left running")


async def kills(options: argparse.Namespace, log: Path) -> Row:
    """The worker is killed and stopped at random moments under streams; the texts are those of an undisturbed run."""
    row = Row(
        f"{options.streams} streams at a time, worker killed {options.kills} times and stopped {options.stops} times"
    )
    chance = random.Random(options.seed)
    faults = [signal.SIGKILL] * options.kills + [signal.SIGSTOP] * options.stops
    chance.shuffle(faults)
    async with running(
        log, "--restart-budget", "1000", "--step-timeout", str(options.step_timeout), models=MODEL
    ) as service:
        undisturbed = [stream.text for stream in await stream_all(service, options, options.tokens)]
        recoveries: list[float] = []
        gaps: list[float] = []
        num_streams = 0
        while faults:
            task = asyncio.ensure_future(stream_all(service, options, options.tokens))
            while faults and not task.done():
                await asyncio.sleep(chance.uniform(0.05, options.pause))
                if task.done() or (worker := service.worker) is None:
                    break
                recoveries.append(await _strike(service, worker, faults.pop()))
            streams = await task
            num_streams += len(streams)
            gaps += [stream.largest_gap for stream in streams]
            row.check(all(stream.complete for stream in streams), "a stream failed")
            row.check([stream.text for stream in streams] == undisturbed, "a text differs from the undisturbed run")
        metrics = await service.metrics()
        row.found += [
            f"{num_streams:,} streams, {int(metrics['requests_replayed_total']):,} replays",
            f"ready again after {statistics.median(recoveries):.2f} s (median), {max(recoveries):.2f} s at most",
            f"largest gap in a stream {max(gaps):.2f} s",
        ]
        row.check(metrics["worker_restarts_total"] == options.kills + options.stops, "restarts were not counted right")
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


async def drains(options: argparse.Namespace, log: Path) -> Row:
    """SIGTERM under load: what was accepted ends whole, what comes later is sent elsewhere, the exit code is 0."""
    row = Row(f"SIGTERM under {options.streams} streams, {options.drains} times")
    unready: list[float] = []
    num_complete = num_refused = 0
    for _ in range(options.drains):
        async with running(log, "--drain-timeout", "300", models=MODEL) as service:
            task = asyncio.ensure_future(stream_all(service, options, options.tokens // 3))
            while (await service.metrics()).get("generated_tokens_total", 0) < options.streams:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            began = time.perf_counter()
            service.process.send_signal(signal.SIGTERM)
            while await service.is_ready():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            unready.append(time.perf_counter() - began)
            streams = await task
            num_complete += sum(stream.complete for stream in streams)
            refused = [stream for stream in streams if stream.status == 503]
            num_refused += len(refused)
            row.check(all(stream.complete or stream.status == 503 for stream in streams), "an accepted stream was lost")
            code = await asyncio.to_thread(service.process.wait, 60)
            row.check(code == 0, f"exit code {code}")
    row.found += [
        f"{num_complete:,} streams whole, {num_refused:,} refused with 503",
        f"not ready after {max(unready) * 1000:.0f} ms at most",
    ]
    return row


async def overload(options: argparse.Namespace, log: Path) -> Row:
    """An open loop at ten times what the service can do: goodput stays, the rest is refused soon and with a time."""
    row = Row(f"open loop at 10 times capacity for {options.seconds:g} s")
    async with running(log, "--max-queue-requests", "64", models=MODEL) as service:
        began = time.perf_counter()
        await stream_all(service, options, 50)
        await stream_all(service, options, 50)
        capacity = 2 * options.streams / (time.perf_counter() - began)
        before = await service.rss_bytes()
        refusals: list[float] = []
        waits: list[str] = []
        probes: list[float] = []

        async def one(number: int) -> bool:
            sent = time.perf_counter()
            response = await service.client.post("/v1/completions", json=body_of(number, 50))
            if response.status_code == 429:
                refusals.append(time.perf_counter() - sent)
                waits.append(response.headers.get("retry-after", ""))
            return response.status_code == 200

        async def probe() -> None:
            while True:
                sent = time.perf_counter()
                await service.client.get("/livez")
                probes.append(time.perf_counter() - sent)
                await asyncio.sleep(0.1)

        prober = asyncio.ensure_future(probe())
        tasks: list[asyncio.Task[bool]] = []
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < options.seconds:
            while len(tasks) < elapsed * capacity * 10:
                tasks.append(asyncio.create_task(one(len(tasks))))
            await asyncio.sleep(0.01)
        finished = sum(task.done() and task.result() for task in tasks)
        served = sum(await asyncio.gather(*tasks))
        prober.cancel()
        row.found += [
            f"capacity {capacity:.1f}/s, {len(tasks):,} sent, {served:,} served ({finished / options.seconds:.1f}/s)",
            f"{len(refusals):,} refused after {1000 * statistics.median(refusals or [0]):.0f} ms (median)",
            f"probes {1000 * statistics.median(probes):.0f} ms (median), {1000 * max(probes):.0f} ms at most",
            f"memory {(await service.rss_bytes()) / before - 1:+.1%}",
        ]
        row.check(served + len(refusals) == len(tasks), "a request was neither served nor refused")
        row.check(all(wait.isdigit() and int(wait) > 0 for wait in waits), "a refusal without a usable Retry-After")
        await check_books(service, row)
    return row


async def leavers(options: argparse.Namespace, log: Path) -> Row:
    """Clients that leave in mid-stream, over and over: nothing of them stays behind."""
    row = Row(f"{options.soak:,} requests, every second client leaves in mid-stream")
    chance = random.Random(options.seed)
    async with running(log, "--no-prefix-caching", models=MODEL) as service:
        gate = asyncio.Semaphore(32)

        async def one(number: int) -> None:
            async with gate:
                if number % 2:
                    await service.stream(**body_of(number, 20))
                    return
                body = {**body_of(number, 400), "stream": True}
                async with service.client.stream("POST", "/v1/completions", json=body) as response:
                    num_lines = chance.randrange(1, 20)
                    async for _ in response.aiter_lines():
                        num_lines -= 1
                        if num_lines <= 0:
                            break

        sizes: list[int] = []
        for part in range(4):
            share = options.soak // 4
            await asyncio.gather(*(one(part * share + number) for number in range(share)))
            sizes.append(await service.rss_bytes())
        while (await service.metrics()).get("requests_running", 0):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await service.stream(**body_of(0, 2))
        metrics = await service.metrics()
        growth = sizes[-1] / sizes[1] - 1
        row.found += [f"memory {growth:+.1%} over the second half", f"KV blocks in use {metrics['kv_cache_usage']:.0%}"]
        row.check(metrics["kv_cache_usage"] == 0, "KV blocks are left")
        row.check(growth <= 0.02, "memory grows")
        await check_books(service, row)
    return row


RUNS: dict[str, Callable[[argparse.Namespace, Path], Awaitable[Row]]] = {
    "kills": kills,
    "drains": drains,
    "overload": overload,
    "leavers": leavers,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=RUNS, action="append", help="may be repeated; default: all")
    parser.add_argument("--streams", type=int, default=64, help="at a time")
    parser.add_argument("--tokens", type=int, default=300, help="length of each stream")
    parser.add_argument("--step-timeout", type=float, default=1.0, help="seconds; on a crowded machine more")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two faults, at most")
    parser.add_argument("--drains", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the overload")
    parser.add_argument("--soak", type=int, default=4000, help="requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table into the README")
    options = parser.parse_args()
    if not STORIES.is_dir():
        sys.stdout.write("the stories260K checkpoint is not in ../shared/data: nothing to run\n")
        return 0
    rows = asyncio.run(_run(options))
    table = "\n".join(["| run | found | law |", "|---|---|---|", *map(str, rows)])
    sys.stdout.write(f"\n{table}\n")
    if options.write:
        text = README.read_text()
        first, last = text.index(BEGIN) + len(BEGIN), text.index(END)
        README.write_text(f"{text[:first]}{table}\n{text[last:]}")
    return 1 if any(row.faults for row in rows) else 0


async def _run(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or RUNS:
            log = Path(folder) / f"{name}.log"
            try:
                rows.append(await RUNS[name](options, log))
            except (RuntimeError, httpx.HTTPError, AssertionError) as error:
                rows.append(Row(name, faults=[f"{type(error).__name__}: {error}"]))
            sys.stdout.write(f"{rows[-1]}{os.linesep}")
            sys.stdout.flush()
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
