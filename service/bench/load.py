"""Drives a server with a workload and notes when each piece of each answer came.

Closed loop: `concurrency` clients, each sending its next request when it has its answer. Open loop: every request at
its own time, however many are under way. Knows OpenAI's stream format, not what is measured from it.
"""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from service.bench.http import BenchHTTPError, Connection
from service.bench.workload import Job

_decoder = json.JSONDecoder()


@dataclass(slots=True)
class Record:
    """One request as the client saw it; times are seconds on one clock."""

    sent: float
    finished: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    num_items: int = 1
    status: int = 200
    error: str | None = None


class _StreamReader:
    """Notes when text came in an SSE answer; a plain JSON answer is read for its usage when it is complete."""

    def __init__(self, record: Record, *, ends_by_reason: bool) -> None:
        self._record = record
        self._ends_by_reason = ends_by_reason
        self._rest = b""
        self._plain: list[bytes] = []
        self._has_begun = self._is_done = False

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        if (not self._has_begun and data[:1] in (b"{", b"[")) or self._plain:
            self._plain.append(data)
            return
        self._has_begun = True
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        record, event = self._record, json.loads(data)
        if "error" in event:
            record.error = data.decode(errors="replace")[:300]
        if usage := event.get("usage"):
            record.num_output_tokens = usage.get("completion_tokens", record.num_output_tokens)
            record.num_prompt_tokens = usage.get("prompt_tokens", 0)
        choices = event.get("choices", ())
        if any(map(_shows_text, choices)):
            record.chunk_times.append(now)
        if self._ends_by_reason and any(choice.get("finish_reason") for choice in choices):
            self._is_done = True

    def close(self) -> None:
        record = self._record
        if self._plain:
            usage = _usage(b"".join(self._plain))
            record.num_output_tokens = usage.get("completion_tokens", 0)
            record.num_prompt_tokens = usage.get("prompt_tokens", 0)
        elif self._has_begun:
            record.num_output_tokens = record.num_output_tokens or len(record.chunk_times)
            if not self._is_done and record.error is None:
                end = "a finish_reason" if self._ends_by_reason else "[DONE]"
                record.error = f"the stream ended without {end}"


def _shows_text(choice: dict[str, Any]) -> bool:
    """What a reader would see something of: not the role alone, nor the reason alone."""
    delta = choice.get("delta") or {}
    shown = (choice.get("text"), *(delta.get(name) for name in ("content", "reasoning_content", "tool_calls")))
    return any(shown)


def _usage(answer: bytes) -> dict[str, int]:
    """The `usage` object of a JSON answer; the vectors before it are not parsed, which would cost too much."""
    start = answer.rfind(b'"usage"')
    if start < 0:
        return {}
    rest = answer[start + len(b'"usage"') :].decode(errors="replace").lstrip(" :")
    found, _ = _decoder.raw_decode(rest)
    return found if isinstance(found, dict) else {}


async def send(connection: Connection, job: Job) -> Record:
    record = Record(sent=time.perf_counter(), num_items=job.num_items)
    reader = _StreamReader(record, ends_by_reason=job.ends_by_reason)
    try:
        await connection.post(job.path, job.body, reader.feed)
        reader.close()
    except BenchHTTPError as error:
        record.error, record.status = str(error), error.status
    except (OSError, ValueError) as error:  # no connection, or events that are not JSON
        record.error, record.status = str(error), 0
    record.finished = time.perf_counter()
    return record


async def closed_loop(
    url: str, headers: dict[str, str], jobs: Iterator[Job], *, concurrency: int, count: int, seconds: float = math.inf
) -> list[Record]:
    """`count` requests from `concurrency` clients; after `seconds` no further ones are begun."""
    records: list[Record] = []
    remaining = iter(range(count))
    until = time.perf_counter() + seconds

    async def client() -> None:
        connection = Connection(url, headers)
        for _ in remaining:
            records.append(await send(connection, next(jobs)))
            if time.perf_counter() > until:
                break
        await connection.aclose()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return records


async def open_loop(url: str, headers: dict[str, str], jobs: list[Job]) -> list[Record]:
    """Each job at its own time after the start; connections are reused as they come free."""
    began = time.perf_counter()
    idle: list[Connection] = []

    async def one(job: Job) -> Record:
        await asyncio.sleep(began + job.at_seconds - time.perf_counter())
        connection = idle.pop() if idle else Connection(url, headers)
        record = await send(connection, job)
        idle.append(connection)
        return record

    records = await asyncio.gather(*(one(job) for job in jobs))
    for connection in idle:
        await connection.aclose()
    return list(records)
