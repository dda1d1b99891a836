"""What is sent and when: prompts of wanted lengths, and arrivals in closed loop, at random, or as in a trace.

Everything is drawn from one seed, so that two servers are given the same work. Runs in the benchmark's process.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend
""".split()


TOKENS_AHEAD = 1 << 19
"""Prompts of so many tokens are made before the clock starts: what makes them would take its time from the server."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its JSON body, the path it goes to, how many texts it holds, and when it is sent (seconds)."""

    path: str
    body: bytes
    num_items: int = 1
    at_seconds: float = 0.0
    ends_by_reason: bool = False
    """Its stream has ended with a finish_reason: the server sends no `[DONE]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`token_ids` is a range to draw prompt ids from (exact lengths); without it prompts are about as many words.
    `path` is asked instead of /v1/`endpoint`, for servers that put an endpoint elsewhere. `fields` are put over the
    body's own; one that is None is left out."""

    endpoint: str = "completions"
    model: str | None = None
    prompt_tokens: int = 128
    output_tokens: int = 64
    items: int = 1
    token_ids: tuple[int, int] | None = None
    prompts: tuple[str, ...] = ()
    stream: bool = True
    encoding_format: str | None = None
    labels: tuple[str, ...] = ()
    path: str | None = None
    fields: dict[str, Any] | None = None
    ends_by_reason: bool = False
    seed: int = 0

    def jobs(self) -> Iterator[Job]:
        """Endless distinct requests."""
        draw = random.Random(self.seed)
        while True:
            yield self.job(draw, self.prompt_tokens, self.output_tokens)

    def ahead(self, jobs: Iterator[Job], count: int) -> Iterator[Job]:
        """The same `jobs`, of which the next are made now: `count`, or what takes a moment."""
        moment = TOKENS_AHEAD // max(1, self.prompt_tokens * self.items)
        return chain(list(islice(jobs, min(count, max(1, moment)))), jobs)

    def job(self, draw: random.Random, prompt_tokens: int, output_tokens: int, at_seconds: float = 0.0) -> Job:
        body: dict[str, Any] = {"model": self.model} if self.model else {}
        texts = [self._prompt(draw, prompt_tokens) for _ in range(self.items)]
        match self.endpoint:
            case "completions":
                body |= {"prompt": texts[0], **self._generation(output_tokens)}
            case "chat/completions":
                body |= {"messages": [{"role": "user", "content": texts[0]}], **self._generation(output_tokens)}
            case "embeddings":
                body |= {"input": texts if self.items > 1 else texts[0]}
                body |= {"encoding_format": self.encoding_format} if self.encoding_format else {}
            case "similarity":
                body |= {"source": self._prompt(draw, prompt_tokens), "targets": texts}
            case "rerank":
                body |= {"query": self._prompt(draw, 8), "documents": texts}
            case "classify" | "sentiment":
                body |= {"input": texts} | ({"labels": self.labels} if self.labels else {})
            case _:
                raise ValueError(f"no workload for endpoint '{self.endpoint}'")
        body = {name: value for name, value in (body | (self.fields or {})).items() if value is not None}
        path, encoded = self.path or f"/v1/{self.endpoint}", json.dumps(body).encode()
        return Job(path, encoded, self.items, at_seconds, self.ends_by_reason)

    def _generation(self, output_tokens: int) -> dict[str, Any]:
        body = {"max_tokens": output_tokens, "stream": self.stream, "temperature": 0.0, "ignore_eos": True}
        return body | ({"stream_options": {"include_usage": True}} if self.stream else {})

    def _prompt(self, draw: random.Random, num_tokens: int) -> str | list[int]:
        if self.prompts:
            return draw.choice(self.prompts)
        if self.token_ids is not None:
            return draw.choices(range(*self.token_ids), k=num_tokens)
        return " ".join(draw.choices(WORDS, k=max(num_tokens, 1)))


def poisson_jobs(workload: Workload, *, rate: float, count: int) -> list[Job]:
    """`count` requests whose gaps are exponential with mean 1 / `rate` seconds (open loop)."""
    draw = random.Random(workload.seed)
    at_seconds, jobs = 0.0, []
    for _ in range(count):
        at_seconds += draw.expovariate(rate)
        jobs.append(workload.job(draw, workload.prompt_tokens, workload.output_tokens, at_seconds))
    return jobs


def trace_jobs(workload: Workload, path: Path, *, count: int, speed: float, max_tokens: int) -> list[Job]:
    """Requests as in a CSV trace with TIMESTAMP, ContextTokens, GeneratedTokens (the Azure LLM traces), `speed` times
    as fast, each length cut at `max_tokens`."""
    draw = random.Random(workload.seed)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    jobs: list[Job] = []
    first: datetime | None = None
    for row in csv.DictReader(io.StringIO(raw.decode())):
        when = datetime.fromisoformat(row["TIMESTAMP"][:26])
        first = first or when
        prompt_tokens, output_tokens = int(row["ContextTokens"]), max(int(row["GeneratedTokens"]), 1)
        at_seconds = (when - first).total_seconds() / speed
        jobs.append(workload.job(draw, min(prompt_tokens, max_tokens), min(output_tokens, max_tokens), at_seconds))
        if len(jobs) == count:
            break
    return jobs


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a text file (a line each) or JSONL with `prompt`, `text`, `question` or `input`."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return tuple(lines)
    found = []
    for line in lines:
        row = json.loads(line)
        found.append(next(str(row[key]) for key in ("prompt", "text", "question", "input") if key in row))
    return tuple(found)
