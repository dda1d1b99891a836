"""`python -m service.bench.costs`: what the service itself costs, apart from the network's arithmetic.

Seconds from process start to ready and memory, on the shipped checkpoints; throughput with `--deterministic`; a step's
own time as contexts grow; what guessed tokens give and cost, of a text's own and of a draft; 1, 2 and 4 loaded
checkpoints; adapters over one. A tool for Linux; nothing of the service imports it.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import uvloop
from numpy.typing import NDArray

from service.bench.command import make_parser, measure
from service.bench.own import total, write_between
from service.bench.report import Figures
from service.bench.shapes import SHAPES, make_adapter, make_checkpoint, make_drafted
from service.own_service import serving

ROOT = Path(__file__).parents[2]
SHIPPED = tuple(str(folder) for folder in sorted((ROOT / "checkpoints").glob("slimpajama-*")))
BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->"
CONTEXTS = (128, 1024, 2048, 4096, 8000)


def bench(url: str, shape: str, *arguments: str) -> list[Figures]:
    vocabulary = SHAPES[shape]["vocab_size"]
    options = make_parser().parse_args(["--url", url, "--token-ids", f"1:{vocabulary}", *arguments])
    return uvloop.run(measure(options))


def start_and_memory(options: argparse.Namespace) -> list[str]:
    models = [part for folder in SHIPPED for part in ("--model", folder)]
    seconds, api, worker = [], [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        with serving(*models) as (url, process):
            seconds.append(time.perf_counter() - began)
            arguments = ["--url", url, "--prompt-tokens", "32", "--concurrency", "16", "--requests", "64"]
            uvloop.run(measure(make_parser().parse_args(arguments)))
            api.append(resident_bytes(process.pid))
            worker.append(sum(resident_bytes(child) for child in children(process.pid)))
    return [
        f"| process start to ready, the shipped checkpoints | {statistics.median(seconds):.1f} s |",
        f"| memory of the API process, after 64 requests by 16 clients | {statistics.median(api) / 1e6:.0f} MB |",
        f"| memory of the worker, with the 1 GiB that KV blocks may take | {statistics.median(worker) / 1e6:.0f} MB |",
    ]


def resident_bytes(pid: int) -> int:
    """Pages in memory, those shared with other processes included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    return [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def determinism(options: argparse.Namespace) -> list[str]:
    folder = str(make_checkpoint(options.shape, options.folder))
    ids = f"1:{SHAPES[options.shape]['vocab_size']}"
    found = ratios(folder, ("--deterministic",), (1, 16), options.rounds, "--token-ids", ids)
    return [
        f"| `--deterministic`, {streams} streams | {ratio:.0%} of the throughput without |" for streams, ratio in found
    ]


def speculation(options: argparse.Namespace) -> list[str]:
    """Where a text repeats itself, as the greedy ones of random weights do, and where it hardly does."""
    setting = ("--speculative-tokens", "8")
    folder = str(make_checkpoint(options.shape, options.folder))
    ids = f"1:{SHAPES[options.shape]['vocab_size']}"
    lines = []
    for text, model, work in (
        ("a text that soon repeats itself", folder, ("--token-ids", ids, "--output-tokens", "256")),
        ("prose of the shipped language model", SHIPPED[1], ("--prompts", str(ROOT / "README.md"))),
    ):
        for streams, ratio in ratios(model, setting, (1, 4, 16), options.rounds, *work):
            lines.append(
                f"| `{' '.join(setting)}`, {text}, {streams} streams | {ratio:.2f} times the throughput without |"
            )
    return lines


def ratios(
    folder: str, setting: tuple[str, ...], streams: tuple[int, ...], rounds: int, *work: str
) -> list[tuple[int, float]]:
    """The throughput with a setting over that without, by the number of streams; both loaded at once, measured in
    turn."""
    found = []
    with serving("--model", folder) as (plain, _), serving("--model", folder, *setting) as (changed, _):
        for count in streams:
            rates: dict[str, list[float]] = {plain: [], changed: []}
            load = ("--concurrency", str(count), "--requests", str(max(4, 2 * count)))
            for _ in range(rounds):
                for url, rate in rates.items():
                    (figures,) = uvloop.run(measure(make_parser().parse_args(["--url", url, *load, *work])))
                    rate.append(figures.output_tokens_per_second)
            found.append((count, statistics.median(rates[changed]) / statistics.median(rates[plain])))
    return found


def contexts(options: argparse.Namespace) -> list[str]:
    """Time between tokens of one stream, by the length of what came before, with each type of keys and values in turn;
    and what of a step is not the forward pass: the least of the rounds, because other work only ever adds to it."""
    folder = str(make_checkpoint(options.shape, options.folder))
    cells = [(length, dtype) for length in CONTEXTS for dtype in ("auto", "int8")]
    outside: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    between: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    with (
        serving("--model", folder) as (plain, _),
        serving("--model", folder, "--kv-cache-dtype", "int8") as (narrow, _),
    ):
        urls = {"auto": plain, "int8": narrow}
        for seed in range(options.rounds):
            for length, dtype in cells:
                work = ("--concurrency", "1", "--requests", "2", "--warm-up", "1", "--seed", str(2 * seed))
                before = step_totals(urls[dtype])
                (figures,) = bench(urls[dtype], options.shape, *work, "--prompt-tokens", str(length))
                steps, seconds, forward = (b - a for a, b in zip(before, step_totals(urls[dtype]), strict=True))
                outside[length, dtype].append((seconds - forward) / steps * 1e6)
                between[length, dtype].append(figures.inter_token_seconds["p50"] * 1000)
    least = {cell: min(found) for cell, found in between.items()}
    return [
        f"| context of {length:,} tokens, one stream | {least[length, 'auto']:.1f} ms between tokens, "
        f"{least[length, 'int8']:.1f} with `--kv-cache-dtype int8`; {min(outside[length, 'auto']):.0f} µs of a step "
        "outside the network |"
        for length in CONTEXTS
    ]


def step_totals(url: str) -> tuple[float, float, float]:
    """Steps, seconds of steps, seconds of forward passes so far."""
    names = ("step_seconds_count", "step_seconds_sum", "forward_seconds_sum")
    steps, seconds, forward = (total(url, f"slimpajama_{name}") for name in names)
    return steps, seconds, forward


def loaded(options: argparse.Namespace) -> list[str]:
    """1, 2 and 4 checkpoints in one worker: the first alone is asked, then all at once."""
    folder = make_checkpoint(options.shape, options.folder)
    lines = []
    for count in (1, 2, 4):
        models = [part for number in range(count) for part in ("--model", f"{folder}=m{number}")]
        with serving(*models, "--kv-cache-memory", "256MiB") as (url, process):
            work = ("--concurrency", "8", "--requests", "24")
            (one,) = bench(url, options.shape, *work, "--model", "m0")
            together = asyncio.run(_all(url, options.shape, [f"m{number}" for number in range(count)]))
            memory = sum(resident_bytes(child) for child in children(process.pid)) / 1e6
        lines.append(
            f"| {count} loaded, 8 streams to one; 8 shared by all | {one.output_tokens_per_second:.0f} tok/s; "
            f"{sum(together):.0f} tok/s ({' + '.join(f'{rate:.0f}' for rate in together)}); worker {memory:.0f} MB |"
        )
    return lines


def adapters(options: argparse.Namespace) -> list[str]:
    """Adapters of rank 16 over one base: 8 streams to it alone, then shared out among so many. What the worker computes
    for each token, by its processor time, which other work on the machine does not count into."""
    base = make_checkpoint(options.shape, options.folder)
    given = [part for n in range(4) for part in ("--adapter", f"{make_adapter(options.shape, options.folder, n)}=a{n}")]
    cases = [["base"], ["a0"], ["base", "a0"], ["a0", "a1"], ["a0", "a1", "a2", "a3"]]
    costs: list[list[float]] = [[] for _ in cases]
    settings = ("--kv-cache-memory", "256MiB", "--no-prefix-caching")  # the cases ask with the same prompts
    with serving("--model", f"{base}=base", *given, *settings) as (url, process):
        (worker,) = children(process.pid)
        for _ in range(options.rounds):
            for names, cost in zip(cases, costs, strict=True):
                before = cpu_seconds(worker), total(url, "slimpajama_generated_tokens_total")
                asyncio.run(_all(url, options.shape, names))
                seconds, tokens = cpu_seconds(worker) - before[0], total(url, "slimpajama_generated_tokens_total")
                cost.append(1000 * seconds / (tokens - before[1]))
    plain = statistics.median(costs[0])
    return [
        f"| 8 streams to {', '.join(names)} | {statistics.median(cost):.2f} ms a token, "
        f"{statistics.median(cost) / plain:.2f} times the base's |"
        for names, cost in zip(cases, costs, strict=True)
    ]


def drafts(options: argparse.Namespace) -> list[str]:
    """A draft of the shape's first tenth, which is right as often as the other layers are faint: what the worker
    computes for each token with it and without, asked in turn, by its processor time."""
    lines = []
    for loudness in (0.02, 1.0):
        large, draft = make_drafted(options.shape, options.folder, loudness)
        settings = ("--model", f"{large}=m", "--kv-cache-memory", "256MiB", "--worker-threads", "1")
        with serving(*settings) as plain, serving(*settings, "--draft", f"{draft}=m") as drafted:
            for streams in (1, 4, 16):
                work = ("--concurrency", str(streams), "--requests", str(6 * streams))
                totals = np.zeros((2, 4))
                for seed in range(options.rounds):
                    for place, (url, process) in enumerate((plain, drafted)):
                        before = _spent(url, process)
                        bench(url, options.shape, *work, "--seed", str(2 * seed))
                        totals[place] += _spent(url, process) - before
                (without, with_draft), (guessed, right) = 1000 * totals[:, 0] / totals[:, 1], totals[1, 2:]
                lines.append(
                    f"| {streams} streams, the draft right {right / max(guessed, 1):.0%} of {guessed:,.0f} times | "
                    f"{with_draft:.2f} ms a token, {with_draft / without:.2f} times that without |"
                )
    return lines


def _spent(url: str, process: "subprocess.Popen[bytes]") -> NDArray[np.float64]:
    """The worker's processor time, tokens, guesses, and how many of these were right, so far."""
    (worker,) = children(process.pid)
    names = ("generated_tokens", "draft_tokens", "accepted_draft_tokens")
    return np.array([cpu_seconds(worker), *(total(url, f"slimpajama_{name}_total") for name in names)])


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _all(url: str, shape: str, names: list[str]) -> list[float]:
    vocabulary = SHAPES[shape]["vocab_size"]
    work = ["--url", url, "--token-ids", f"1:{vocabulary}", "--requests", str(24 // len(names))]
    work += ["--concurrency", str(8 // len(names))]
    runs = [measure(make_parser().parse_args([*work, "--model", name])) for name in names]
    return [figures.output_tokens_per_second for (figures,) in await asyncio.gather(*runs)]


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "start": start_and_memory,
    "deterministic": determinism,
    "speculative": speculation,
    "drafts": drafts,
    "contexts": contexts,
    "loaded": loaded,
    "adapters": adapters,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.bench.costs", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-results"), help="where checkpoints are kept")
    parser.add_argument("--write", action="store_true", help="write the parts' rows into docs/performance.md")
    options = parser.parse_args()
    for name in options.parts.split(","):
        rows = PARTS[name](options)
        shape = "" if options.shape == parser.get_default("shape") else f" --shape {options.shape}"
        command = f"`python -m service.bench.costs --parts {name}{shape}`"
        table = "\n".join([command, "", "| what | found |", "|---|---|", *rows])
        sys.stdout.write(table + "\n\n")
        if options.write:
            write_between(BEGIN.replace("costs", f"costs {name}"), END.replace("costs", f"costs {name}"), table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
