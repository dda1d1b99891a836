"""`make bench`: our own service on this machine, at a well-known shape, into the first table of docs/performance.md.

Starts `slimpajama serve` on random weights, sweeps the concurrency with distinct prompts, and reads from the metrics
what the network took of each step and what the rest of us cost. A tool; nothing of the service imports it.
"""

import argparse
import os
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import uvloop

from service.bench.command import make_parser, measure
from service.bench.report import Figures
from service.bench.shapes import SHAPES, make_checkpoint
from service.own_service import serving

PERFORMANCE = Path(__file__).parents[2] / "docs/performance.md"
BEGIN, END = "<!-- numbers -->\n", "<!-- /numbers -->"


@dataclass(frozen=True, slots=True)
class Counters:
    """Running totals of a service, in seconds and tokens."""

    forward_seconds: float
    api_cpu_seconds: float
    generated_tokens: float
    wall_seconds: float

    @classmethod
    def read(cls, url: str) -> "Counters":
        return cls(
            total(url, "slimpajama_forward_seconds_sum"),
            total(url, "process_cpu_seconds_total"),
            total(url, "slimpajama_generated_tokens_total"),
            time.perf_counter(),
        )


def total(url: str, name: str) -> float:
    """A metric of the service, summed over its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.bench.own", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--folder", type=Path, default=Path("bench-results"), help="where the checkpoint is kept")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.shape, options.folder)
    with serving("--model", str(checkpoint), "--quantization", options.quantization) as (url, _):
        table = run(url, options)
    sys.stdout.write(table + "\n")
    if options.write:
        write_between(BEGIN, END, table)
    return 0


def run(url: str, options: argparse.Namespace) -> str:
    vocabulary = SHAPES[options.shape]["vocab_size"]
    rows = []
    for concurrency in options.concurrency.split(","):
        arguments = ["--url", url, "--concurrency", concurrency, "--token-ids", f"1:{vocabulary}"]
        arguments += ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
        before = Counters.read(url)
        figures = uvloop.run(measure(make_parser().parse_args(arguments)))[0]
        rows.append(_row(figures, before, Counters.read(url)))
    head = [
        f"`python -m service.bench.own --shape {options.shape} --quantization {options.quantization}`: "
        f"{options.prompt_tokens} tokens in, {options.output_tokens} out, {os.cpu_count()} cores, "
        f"{'bfloat16' if options.quantization == 'none' else options.quantization}, random weights, distinct prompts.",
        "",
        "| streams | output tok/s | first token ms | between tokens ms (p50 / p99) | outside the network | API CPU |",
        "|---|---|---|---|---|---|",
    ]
    note = [
        "",
        "Outside the network: the share of the wall clock in which no forward pass was running (HTTP, scheduling, "
        "detokenization, messages). API CPU: the API process's share of one core per 1,000 output tokens/s.",
    ]
    return "\n".join([*head, *rows, *note])


def _row(figures: Figures, before: Counters, after: Counters) -> str:
    wall = after.wall_seconds - before.wall_seconds
    outside = 1 - (after.forward_seconds - before.forward_seconds) / wall
    tokens = after.generated_tokens - before.generated_tokens
    api_share = (after.api_cpu_seconds - before.api_cpu_seconds) / tokens * 1000
    gaps = figures.inter_token_seconds
    return (
        f"| {figures.label.removeprefix('c=')} | {figures.output_tokens_per_second:.0f} | "
        f"{figures.first_token_seconds['p50'] * 1000:.0f} | {gaps['p50'] * 1000:.1f} / {gaps['p99'] * 1000:.0f} | "
        f"{outside:.0%} | {api_share:.0%} |"
    )


def write_between(begin: str, end: str, table: str) -> None:
    """Puts a table between two marks of docs/performance.md."""
    text = PERFORMANCE.read_text()
    first, last = text.index(begin) + len(begin), text.index(end)
    PERFORMANCE.write_text(f"{text[:first]}{table}\n{text[last:]}")


if __name__ == "__main__":
    sys.exit(main())
