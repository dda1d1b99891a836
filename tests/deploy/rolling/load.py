"""Callers that ask without a pause, each over a connection that it keeps, and note every answer that is not whole.

Streams, whole completions and embeddings, short and long. Not a test: see `run.py`.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

PATIENCE_SECONDS = 120
LENGTHS = (8, 60, 400)


@dataclass(slots=True)
class Seen:
    """What came of all requests: whole answers by kind, and each fault with the second in which it began."""

    whole: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_seconds: float = 0.0


class Load:
    def __init__(self, url: str, num_callers: int) -> None:
        self.seen = Seen()
        self._url = url
        self._stopping = False
        self._began = time.monotonic()
        self._callers = [asyncio.create_task(self._call(number)) for number in range(num_callers)]

    async def stop(self) -> Seen:
        """Once every caller has its last answer."""
        self._stopping = True
        await asyncio.gather(*self._callers)
        return self.seen

    async def _call(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE_SECONDS) as client:
            turn = number
            while not self._stopping:
                began = time.monotonic()
                kind = ("stream", "completion", "embeddings")[turn % 3]
                try:
                    fault = await getattr(self, f"_{kind}")(client, LENGTHS[turn // 3 % len(LENGTHS)], turn)
                except httpx.TransportError as error:
                    fault = repr(error)
                if fault:
                    self.seen.faults.append(f"{began - self._began:.1f} s: {kind}: {fault}")
                    await asyncio.sleep(0.1)
                else:
                    self.seen.whole[kind] += 1
                    self.seen.longest_seconds = max(self.seen.longest_seconds, time.monotonic() - began)
                turn += 1

    @staticmethod
    async def _stream(client: httpx.AsyncClient, length: int, seed: int) -> str | None:
        async with client.stream("POST", "/v1/completions", json=completion(length, seed, stream=True)) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {(await answer.aread()).decode()[:200]}"
            events = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
        if len(events) < 2 or events[-1] != "[DONE]":
            return f"the stream ended with {events[-1:]}"
        return None if json.loads(events[-2])["choices"][0]["finish_reason"] == "length" else events[-2]

    @staticmethod
    async def _completion(client: httpx.AsyncClient, length: int, seed: int) -> str | None:
        answer = await client.post("/v1/completions", json=completion(length, seed))
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        return None if answer.json()["usage"]["completion_tokens"] == length else answer.text[:200]

    @staticmethod
    async def _embeddings(client: httpx.AsyncClient, length: int, seed: int) -> str | None:
        texts = [f"text number {seed}"] * (1 + length // 50)
        answer = await client.post("/v1/embeddings", json={"model": "slimpajama-tiny-encoder", "input": texts})
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        return None if len(answer.json()["data"]) == len(texts) else answer.text[:200]


def completion(length: int, seed: int, **more: Any) -> dict[str, Any]:
    body = {"model": "slimpajama-tiny-lm", "prompt": "Once", "max_tokens": length, "ignore_eos": True, "seed": seed}
    return body | more
