"""`slimpajama bench`: measures any OpenAI-compatible server, ours or another, with the same work for each.

Parses, runs the load and prints a table; `--json` and `--page` keep the figures. Needs no torch.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import uvloop

from service.bench.load import Record, closed_loop, open_loop
from service.bench.report import Figures, Limits, figures, table, write_json, write_page
from service.bench.workload import Workload, poisson_jobs, read_prompts, trace_jobs

ENDPOINTS = ("completions", "chat/completions", "embeddings", "similarity", "rerank", "classify", "sentiment")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slimpajama bench", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server, without /v1 (default: %(default)s)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--model", help="the model field of each request (default: left out)")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default="completions")
    parser.add_argument("--path", help="ask this path of the server (default: /v1/ENDPOINT)")
    parser.add_argument("--fields", type=json.loads, metavar="JSON", help="put over each body; null leaves a field out")
    parser.add_argument("--label", default="", help="put before each row's name")
    work = parser.add_argument_group("work")
    work.add_argument("--prompt-tokens", type=int, default=128, help="length of each prompt (default: %(default)s)")
    work.add_argument("--output-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    work.add_argument("--items", type=int, default=1, help="texts in each request, where an endpoint takes several")
    work.add_argument(
        "--token-ids",
        type=_range,
        metavar="LOW:HIGH",
        help="send prompts as random token ids of this range, for exact lengths",
    )
    work.add_argument("--prompts", type=_file, help="draw prompts from this file: a line each, or JSONL")
    work.add_argument("--encoding-format", choices=("float", "base64"), help="of embeddings (default: the server's)")
    work.add_argument("--labels", help="for classify: labels that the texts are judged by, separated by commas")
    work.add_argument(
        "--ends-by-reason", action="store_true", help="the server ends streams with a finish_reason, without [DONE]"
    )
    work.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    work.add_argument("--seed", type=int, default=0)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=_counts,
        default="1,4,16,64",
        help="closed loop: clients, a run each (default: %(default)s)",
    )
    load.add_argument("--requests", type=int, help="requests in a run (default: 4 for each client, at least 8)")
    load.add_argument("--seconds", type=float, help="closed loop by time instead: begin no request after this long")
    load.add_argument("--rate", type=float, help="open loop instead: requests per second, at Poisson times")
    load.add_argument(
        "--trace", type=_file, help="open loop as in this CSV of TIMESTAMP, ContextTokens, GeneratedTokens"
    )
    load.add_argument("--trace-speed", type=float, default=1.0, help="replay the trace this many times as fast")
    load.add_argument("--max-tokens", type=int, default=512, help="cut a trace's lengths here (default: %(default)s)")
    load.add_argument("--warm-up", type=int, default=2, help="requests sent before, not counted (default: %(default)s)")
    good = parser.add_argument_group("goodput: what a request must meet to count, in milliseconds")
    good.add_argument("--first-token-limit", type=float)
    good.add_argument("--inter-token-limit", type=float)
    good.add_argument("--total-limit", type=float)
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, help="write the figures here")
    out.add_argument("--page", type=Path, help="write an HTML page with a plot here")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("clients are counted from 1")
    return counts


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not 0 <= int(low) < int(high):
        raise argparse.ArgumentTypeError("ids are from LOW on and below HIGH")
    return int(low), int(high)


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    runs = uvloop.run(measure(options))
    print(table(runs))  # noqa: T201
    setting = {name: str(value) for name, value in vars(options).items() if value is not None and name != "api_key"}
    if options.json:
        write_json(runs, options.json, setting)
    if options.page:
        write_page(runs, options.page, setting)
    for run in runs:
        for error, count in run.errors.items():
            print(f"{run.label}: {count} x {error}", file=sys.stderr)  # noqa: T201
    return 1 if any(run.failed > run.rejected for run in runs) else 0


async def measure(options: argparse.Namespace) -> list[Figures]:
    workload = _workload(options)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    if options.warm_up:
        warm_up = Workload(**{**_fields(workload), "seed": options.seed + 1})
        await closed_loop(options.url, headers, warm_up.jobs(), concurrency=1, count=options.warm_up)
    limits = Limits(
        first_token_seconds=_seconds(options.first_token_limit),
        inter_token_seconds=_seconds(options.inter_token_limit),
        total_seconds=_seconds(options.total_limit),
    )
    if options.rate or options.trace:
        records = await _open(options, workload, headers)
        return [figures(f"{options.label}open loop", records, limits)]
    runs, jobs = [], workload.jobs()
    for concurrency in options.concurrency:
        count = options.requests or (sys.maxsize if options.seconds else max(4 * concurrency, 8))
        ahead, seconds = workload.ahead(jobs, count), options.seconds or math.inf
        records = await closed_loop(options.url, headers, ahead, concurrency=concurrency, count=count, seconds=seconds)
        runs.append(figures(f"{options.label}c={concurrency}", records, limits))
    return runs


async def _open(options: argparse.Namespace, workload: Workload, headers: dict[str, str]) -> list[Record]:
    count = options.requests or 100
    if options.trace:
        jobs = trace_jobs(
            workload, options.trace, count=count, speed=options.trace_speed, max_tokens=options.max_tokens
        )
    else:
        jobs = poisson_jobs(workload, rate=options.rate, count=count)
    return await open_loop(options.url, headers, jobs)


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(
        endpoint=options.endpoint,
        model=options.model,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        items=options.items,
        token_ids=options.token_ids,
        prompts=read_prompts(options.prompts) if options.prompts else (),
        stream=not options.no_stream,
        encoding_format=options.encoding_format,
        labels=tuple(options.labels.split(",")) if options.labels else (),
        path=options.path,
        fields=options.fields,
        ends_by_reason=options.ends_by_reason,
        seed=options.seed,
    )


def _fields(workload: Workload) -> dict[str, object]:
    return {name: getattr(workload, name) for name in workload.__dataclass_fields__}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
