"""The service as a user starts it: `slimpajama serve` in a process of its own, talked to over HTTP."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
STORIES = DATA / "stories260K-hf"


@dataclass(slots=True)
class Service:
    """One running service; `lines` are what it has logged."""

    process: subprocess.Popen[str]
    client: httpx.AsyncClient
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @property
    def worker(self) -> psutil.Process:
        """The worker process of now."""
        for child in psutil.Process(self.process.pid).children():
            if "service.engine.worker" in child.cmdline():
                return child
        raise AssertionError("there is no worker")

    async def until_ready(self) -> None:
        while (await self.client.get("/readyz")).status_code != 200:
            assert self.process.poll() is None, "".join(self.lines)
            await asyncio.sleep(0.05)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in (await self.client.get("/metrics")).text.splitlines():
            found = re.fullmatch(rf"slimpajama_{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total


MakeService = Callable[..., Awaitable[Service]]


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.fixture
async def make_service() -> AsyncIterator[MakeService]:
    """Starts services that are ready; ends them after the test."""
    services: list[Service] = []

    async def make(*arguments: str, models: tuple[str, ...] = (f"{STORIES}=stories",)) -> Service:
        if any(str(STORIES) in model for model in models) and not STORIES.is_dir():
            pytest.skip("the stories260K checkpoint is not in ../shared/data")
        command = [sys.executable, "-m", "service", "serve", "--port", "0", "--log-format", "json"]
        command += [part for model in models for part in ("--model", model)] + ["--worker-threads", "1", *arguments]
        process = start(command)
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or "listening" not in lines[-1]:
            lines.append(await asyncio.to_thread(process.stdout.readline))
            assert process.poll() is None, "".join(lines)
        reader = asyncio.get_running_loop().run_in_executor(None, lines.extend, process.stdout)
        port = json.loads(lines[-1])["port"]
        limits = httpx.Limits(max_connections=200)
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=240, limits=limits)
        services.append(Service(process, client, lines))
        readers.append(reader)
        await services[-1].until_ready()
        return services[-1]

    readers: list[Any] = []
    yield make
    for service in services:
        await service.client.aclose()
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(service.process.wait, 60)
    await asyncio.gather(*readers)
    for service in services:
        assert service.process.stdout is not None
        service.process.stdout.close()


@pytest.fixture(scope="session")
def cases() -> list[dict[str, Any]]:
    """Greedy continuations by transformers: prompt, ids, text, log-probabilities."""
    path = DATA / "reference-outputs/greedy_transformers_cpu_fp32.json"
    if not path.is_file():
        pytest.skip("the reference outputs are not in ../shared/data")
    found: list[dict[str, Any]] = json.loads(path.read_text())["models"]["stories260K-hf"]["cases"]
    # The file's text is the whole text, the prompt's before the continuation.
    return [{**case, "text": case["new_text"].removeprefix(case["prompt"])} for case in found]


async def complete(service: Service, case: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One unstreamed greedy completion of a reference case."""
    body = {"prompt": case["prompt_ids"], "max_tokens": len(case["new_ids"]), "temperature": 0, **more}
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def streamed(service: Service, case: dict[str, Any], **more: Any) -> tuple[dict[str, Any], bool]:
    """One streamed greedy completion put together to a choice as it comes unstreamed, and whether `[DONE]` came."""
    body = {"prompt": case["prompt_ids"], "max_tokens": len(case["new_ids"]), "temperature": 0, "stream": True, **more}
    whole: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": {"token_logprobs": []}, "finish_reason": None}
    done = False
    async with service.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                choice = json.loads(line[6:])["choices"][0]
                whole["text"] += choice["text"]
                whole["token_ids"] += choice.get("token_ids", [])
                whole["logprobs"]["token_logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
                whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
    return whole, done


async def stream(service: Service, case: dict[str, Any], **more: Any) -> tuple[str, str | None, bool]:
    """One streamed greedy completion: its text, its finish reason, and whether `[DONE]` came."""
    whole, done = await streamed(service, case, **more)
    return whole["text"], whole["finish_reason"], done
