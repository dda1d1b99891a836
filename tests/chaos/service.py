"""The service as a process of its own for the chaos runs: started, asked over HTTP, measured from outside.

Not a test: `run.py` beside it is what `make chaos` runs.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = ROOT / "checkpoints/slimpajama-tiny-lm"
ENCODER = ROOT / "checkpoints/slimpajama-tiny-encoder"
MODELS = (f"{LANGUAGE_MODEL}=lm", f"{ENCODER}=encoder")
ADMIN_KEY = "chaos-admin-key"
MAX_CONNECTIONS = 2000
IDLE_WITHIN_SECONDS = 30.0


@dataclass(slots=True)
class Stream:
    """What one streamed completion came to. `largest_gap` is the longest wait between two events, in seconds."""

    text: str = ""
    version: str = ""
    finish_reason: str | None = None
    done: bool = False
    status: int = 0
    error: str = ""
    largest_gap: float = 0.0
    first_after: float = 0.0

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.done and not self.error


@dataclass(slots=True)
class Service:
    process: "subprocess.Popen[bytes]"
    client: httpx.AsyncClient
    log: Path

    @property
    def port(self) -> int:
        port = self.client.base_url.port
        assert port is not None
        return port

    @property
    def worker(self) -> psutil.Process | None:
        for child in psutil.Process(self.process.pid).children():
            try:
                if "service.engine.worker" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    return child
            except psutil.NoSuchProcess:
                continue
        return None

    async def is_ready(self) -> bool:
        try:
            return (await self.client.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def until_ready(self) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        while not await self.is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the service has ended with {self.process.returncode}: see {self.log}")
            await asyncio.sleep(0.02)
        return time.perf_counter() - began

    async def until_idle(self) -> None:
        """Until every accepted request has ended and no gauge says otherwise, for a while at most."""
        began = time.perf_counter()
        while time.perf_counter() - began < IDLE_WITHIN_SECONDS:
            found = await self.metrics()
            if found.get("requests_accepted_total", 0) == found.get("request_outcomes_total", 0) and not any(
                found.get(gauge, 0) for gauge in ("requests_running", "requests_waiting", "kv_cache_usage")
            ):
                return
            await asyncio.sleep(0.1)

    async def metrics(self) -> dict[str, float]:
        """Sums over all labels, by name without our prefix; accepted and ended also by outcome."""
        totals: dict[str, float] = {}
        for line in (await self.client.get("/metrics")).text.splitlines():
            found = re.fullmatch(r"slimpajama_(\w+?)(?:\{(.*)\})? (\S+)", line)
            if found:
                totals[found[1]] = totals.get(found[1], 0.0) + float(found[3])
                outcome = re.search(r'outcome="(\w+)"', found[2] or "")
                if outcome and found[1] == "request_outcomes_total":
                    totals[f"ended_{outcome[1]}"] = totals.get(f"ended_{outcome[1]}", 0.0) + float(found[3])
        return totals

    async def stream(self, prompt: list[int] | str, **more: Any) -> Stream:
        found = Stream()
        body = {"prompt": prompt, "temperature": 0, "stream": True, **more}
        began = last = time.perf_counter()
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                found.status = response.status_code
                async for line in response.aiter_lines():
                    now = time.perf_counter()
                    if line.startswith("data: "):
                        found.first_after = found.first_after or now - began
                        found.largest_gap, last = max(found.largest_gap, now - last), now
                        _read_event(found, line[6:])
        except httpx.TransportError as error:
            found.error = f"{type(error).__name__}: {error}"
        return found

    def rss_bytes(self) -> tuple[int, int]:
        """Resident memory of the API process and of the worker."""
        worker = self.worker
        assert worker is not None, "the worker is down"
        return psutil.Process(self.process.pid).memory_info().rss, worker.memory_info().rss

    async def admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return await self.client.request(method, f"/admin/models{path}", json=body, headers=headers)


def _read_event(found: Stream, data: str) -> None:
    if data == "[DONE]":
        found.done = True
        return
    event = json.loads(data)
    if "error" in event:
        found.error = event["error"]["message"]
        return
    choice = event["choices"][0]
    found.text += choice["text"]
    if event["system_fingerprint"] not in found.version.split("+"):
        found.version += f"+{event['system_fingerprint']}" if found.version else event["system_fingerprint"]
    found.finish_reason = choice["finish_reason"] or found.finish_reason


@asynccontextmanager
async def running(log: Path, *arguments: str, models: Sequence[str] = MODELS) -> AsyncIterator[Service]:
    """A ready service; ended afterwards if the run has not ended it."""
    process = _launch(log, *arguments, models=models)
    try:
        port = await _port(process, log)
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=100)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as client:
            service = Service(process, client, log)
            await service.until_ready()
            yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 120)


def _launch(log: Path, *arguments: str, models: Sequence[str]) -> "subprocess.Popen[bytes]":
    keys = log.with_suffix(".keys")
    keys.write_text(f"chaos:{ADMIN_KEY}\n")
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--log-format", "json", "--worker-threads", "1"]
    command += ["--dtype", "float32", "--admin-keys-file", str(keys)]
    command += [part for model in models for part in ("--model", model)] + list(arguments)
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)


async def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    while (port := _read_port(log)) is None:
        if process.poll() is not None:
            raise RuntimeError(f"the service has ended with {process.returncode}: see {log}")
        await asyncio.sleep(0.05)
    return port


def _read_port(log: Path) -> int | None:
    for line in log.read_text().splitlines():
        if '"listening"' in line:
            return int(json.loads(line)["port"])
    return None
