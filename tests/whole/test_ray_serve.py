"""`serve run` of service.ray on a Ray of this machine: one replica becomes two under load, and one again without loss.

Each replica has a worker process of its own, seen from outside among the processes that `serve run` started.
"""

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "slimpajama-tiny-lm"
PATIENCE_SECONDS = 240
NUM_CALLERS = 8
NUM_TOKENS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra slimpajama[ray]"),
]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class RayServe:
    """`serve run CONFIG`, in a session of its own; Ray writes into a folder that goes with it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = {
            "model": [str(CHECKPOINT)], "no_auth": True, "kv_cache_memory": "32MiB", "worker_threads": 1,
            "max_sequences": 2, "drain_timeout": 60, "min_replicas": 1, "max_replicas": 2, "target_waiting": 2,
            "target_running": 100, "upscale_seconds": 0, "downscale_seconds": 0, "num_cpus": 0.1,
        }  # fmt: skip
        config = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [{"name": "slimpajama", "import_path": "service.ray:app", "args": arguments}],
        }
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLIMPAJAMA_", "RAY_"))
        }
        environment |= {
            "HOME": str(folder), "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        }  # fmt: skip
        self.log = folder / "log"
        # SIGINT is what ends `serve run` in order; what runs in a shell's background would ignore it.
        command = ["env", "--default-signal=INT", str(Path(sys.executable).parent / "serve"), "run"]
        command += [str(folder / "serve.yaml")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.descendants: dict[int, psutil.Process] = {}

    def workers(self) -> list[psutil.Process]:
        """Our workers that live, of all replicas."""
        for found in psutil.Process(self.process.pid).children(recursive=True):
            self.descendants[found.pid] = found
        return [found for found in self.descendants.values() if is_worker(found)]

    async def until(self, num_workers: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.workers()) != num_workers:
                assert self.process.poll() is None, self.log.read_text()[-4000:]
                await asyncio.sleep(0.2)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "service.engine.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
async def ray_serve() -> AsyncIterator[RayServe]:
    # A short path: Ray's sockets are in it.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        running = RayServe(Path(folder))
        try:
            yield running
        finally:
            if running.process.poll() is None:
                running.workers()
                running.process.send_signal(signal.SIGINT)
                try:
                    await asyncio.to_thread(running.process.wait, 60)
                except subprocess.TimeoutExpired:
                    running.process.kill()
            for left in psutil.wait_procs(list(running.descendants.values()), timeout=10)[1]:
                left.kill()


async def complete(client: httpx.AsyncClient, url: str, number: int) -> str:
    """Of one stream: its finish reason, or what was wrong."""
    body = {"prompt": "Once", "max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": number, "stream": True}
    events: list[str] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return f"{answer.status_code} {(await answer.aread()).decode()}"
        events = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return f"ended with {events[-1]}"
    return str(json.loads(events[-2])["choices"][0]["finish_reason"])


async def test_replicas_follow_the_waiting_gauge_and_go_without_losing_a_request(ray_serve: RayServe) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, limits=httpx.Limits(max_connections=None)) as client:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                assert ray_serve.process.poll() is None, ray_serve.log.read_text()[-4000:]
                try:
                    if (await client.get(f"{ray_serve.url}/readyz")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)
        assert len(ray_serve.workers()) == 1
        outcomes: list[str] = []
        num_callers = NUM_CALLERS

        async def call(number: int) -> None:
            while number < num_callers:
                outcomes.append(await complete(client, ray_serve.url, number))

        callers = [asyncio.create_task(call(number)) for number in range(NUM_CALLERS)]
        await ray_serve.until(num_workers=2)
        first, second = ray_serve.workers()
        assert first.ppid() != second.ppid(), "each replica owns its worker"
        num_callers = 2  # which fit into one replica's batch: nobody waits any more
        await ray_serve.until(num_workers=1)
        num_callers = 0
        await asyncio.gather(*callers)
        assert set(outcomes) == {"length"}, outcomes
        ids = (await client.get(f"{ray_serve.url}/v1/models", headers={"X-Request-ID": "mine"})).headers
        assert set(ids.get_list("x-request-id")) == {"mine"}
    ray_serve.process.send_signal(signal.SIGINT)
    await asyncio.to_thread(ray_serve.process.wait, PATIENCE_SECONDS)
    assert [found for found in ray_serve.descendants.values() if is_worker(found)] == []
