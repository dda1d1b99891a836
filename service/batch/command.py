"""`slimpajama batch`: has a file of requests answered, by a running service or by one of its own.

A run that was interrupted goes on where it was: the same command asks what has no answer yet. A process of its own,
without torch.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.batch.lines import BatchError, check_requests, keep_answers, read_requests
from service.batch.running import run
from service.evaluate.asking import Service
from service.own_service import ServiceEndedError, serving

TOLD_EVERY_SECONDS = 10.0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slimpajama batch",
        usage="slimpajama batch --input FILE --output FILE [--url URL | -- SERVE_FLAGS ...]",
        description="Have a file of requests answered, in the format of OpenAI's batches: a request a line, "
        "an answer a line. Run again, it asks what has no answer yet.",
    )
    parser.add_argument("--input", required=True, type=Path, help="JSONL: custom_id, method, url, body")
    parser.add_argument("--output", required=True, type=Path, help="JSONL: custom_id, response or error; is added to")
    parser.add_argument("--url", help="the running service, like http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="where the service asks for one")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that one may be put off (default: 600)")
    parser.add_argument("serve_flags", nargs="*", metavar="SERVE_FLAGS", help="of a service that runs for the batch")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns 0 where every request has an answer, whatever it is; else 1."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if bool(parsed.url) == bool(parsed.serve_flags):
        parser.error("either --url, or -- and the flags of a service to run, like -- --model FOLDER")
    if parsed.concurrency < 1:
        parser.error("--concurrency is to be at least 1")
    try:
        return _batch(parsed)
    except (BatchError, ServiceEndedError, OSError) as error:
        sys.stderr.write(f"slimpajama batch: {error}\n")
    except KeyboardInterrupt:
        sys.stderr.write("slimpajama batch: interrupted; the same command goes on with what has no answer yet\n")
    return 1


def _batch(parsed: argparse.Namespace) -> int:
    if parsed.output.exists() and parsed.output.samefile(parsed.input):
        raise BatchError(f"{parsed.output} is the input: answers want a file of their own")
    ids = check_requests(parsed.input)
    known = keep_answers(parsed.output)
    left = ids - known
    _tell(f"{len(ids):,} requests, {len(left):,} of them without an answer")
    if not left:
        return 0
    with contextlib.ExitStack() as stack:
        url = parsed.url
        if url is None:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the service would outlive us
            url, _ = stack.enter_context(serving(*parsed.serve_flags))
        # Lone surrogates, which are no UTF-8, as JSON writes them.
        output = stack.enter_context(parsed.output.open("a", encoding="utf-8", errors="backslashreplace"))
        service = Service(
            url=url.rstrip("/"), api_key=parsed.api_key, concurrency=min(parsed.concurrency, len(left)),
            patience_seconds=parsed.patience,
        )  # fmt: skip
        progress = _Progress(len(left))

        def write(line: dict[str, Any]) -> None:
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
            output.flush()
            progress.count()

        try:
            requests = (request for request in read_requests(parsed.input) if request.custom_id in left)
            found = asyncio.run(run(service, requests, write))
        except* (BatchError, OSError) as group:
            raise BatchError(str(group.exceptions[0])) from group
    _tell(_summary(found))
    return 0 if found["no answer"] == 0 else 1


class _Progress:
    def __init__(self, total: int) -> None:
        self._done, self._total, self._told = 0, total, time.monotonic()

    def count(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY_SECONDS:
            self._told = now
            _tell(f"{self._done:,} of {self._total:,}")


def _summary(found: Counter[str]) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in sorted(found.items()))


def _tell(text: str) -> None:
    sys.stderr.write(f"slimpajama batch: {text}\n")
