"""A pod of the chart without a cluster: the service as a process, and what a kubelet and a deployment would do with it.

`Rules` are read from a render of the chart, so that probes, preStop, drain and grace are what is shipped. Knows neither
proxy nor load. Not a test: `run.py` beside it is what `make rolling` runs.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[3]
RENDER = ROOT / "tests" / "helm" / "golden" / "default.yaml"
"""The chart with its default values; a test holds it against what Helm renders."""


@dataclass(frozen=True, slots=True)
class Probe:
    path: str
    period_seconds: float
    timeout_seconds: float
    failure_threshold: int

    @classmethod
    def read(cls, probe: dict[str, Any]) -> "Probe":
        path = probe["httpGet"]["path"]
        return cls(path, probe["periodSeconds"], probe["timeoutSeconds"], probe["failureThreshold"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the chart says of its pods, in seconds."""

    startup: Probe
    readiness: Probe
    liveness: Probe
    pre_stop: float
    drain: float
    grace: float
    min_ready: float

    @classmethod
    def of_the_chart(cls) -> "Rules":
        objects = {found["kind"]: found for found in yaml.safe_load_all(RENDER.read_text()) if found}
        deployment = objects["Deployment"]["spec"]
        pod = deployment["template"]["spec"]
        container = pod["containers"][0]
        return cls(
            startup=Probe.read(container["startupProbe"]),
            readiness=Probe.read(container["readinessProbe"]),
            liveness=Probe.read(container["livenessProbe"]),
            pre_stop=container["lifecycle"]["preStop"]["sleep"]["seconds"],
            drain=yaml.safe_load(objects["ConfigMap"]["data"]["service.yaml"])["drain_timeout"],
            grace=pod["terminationGracePeriodSeconds"],
            min_ready=deployment["minReadySeconds"],
        )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Pod:
    """One process of the service. `changed` is called when it becomes ready or no longer is."""

    def __init__(self, rules: Rules, folder: Path, changed: Callable[[], None]) -> None:
        self.port = free_port()
        self.ready = self.terminating = self.not_live = False
        self.exit_code: int | None = None
        self.termination_seconds = 0.0
        self._rules = rules
        self._changed = changed
        models = [
            f"--model={ROOT / 'checkpoints' / name}" for name in ("slimpajama-tiny-lm", "slimpajama-tiny-encoder")
        ]
        command = [sys.executable, "-m", "service", "serve", "--port", str(self.port), *models]
        command += ["--drain-timeout", str(rules.drain), "--worker-threads", "1", "--kv-cache-memory", "128MiB"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIMPAJAMA_")}
        with (folder / f"pod-{self.port}.log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self._kubelet = asyncio.create_task(self._probe())

    async def until_available(self) -> None:
        """Ready for as long as a roll-out waits before it goes on."""
        while not self.ready:
            if self._kubelet.done():
                self._kubelet.result()
            await asyncio.sleep(0.1)
        await asyncio.sleep(self._rules.min_ready)

    async def terminate(self) -> None:
        """As a kubelet does: the preStop sleep, SIGTERM, and SIGKILL once the grace period is over."""
        began = time.monotonic()
        self.terminating = True
        self._changed()
        await asyncio.sleep(self._rules.pre_stop)
        self._kubelet.cancel()
        self.process.send_signal(signal.SIGTERM)
        try:
            left = began + self._rules.grace - time.monotonic()
            self.exit_code = await asyncio.to_thread(self.process.wait, left)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.exit_code = await asyncio.to_thread(self.process.wait)
        self.termination_seconds = time.monotonic() - began

    def kill(self) -> None:
        self._kubelet.cancel()
        self.process.kill()
        self.process.wait()

    async def _probe(self) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as client:
            await self._until_started(client)
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._watch(client, self._rules.readiness, self._set_ready))
                loops.create_task(self._watch(client, self._rules.liveness, self._set_live))

    async def _until_started(self, client: httpx.AsyncClient) -> None:
        for _ in range(self._rules.startup.failure_threshold):
            if await succeeds(client, self._rules.startup):
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"the service at port {self.port} has ended with {self.process.returncode}")
            await asyncio.sleep(self._rules.startup.period_seconds)
        raise RuntimeError(f"the service at port {self.port} has not started in time")

    async def _watch(self, client: httpx.AsyncClient, probe: Probe, tell: Callable[[bool], None]) -> None:
        num_failures = 0
        while True:
            if await succeeds(client, probe):
                num_failures = 0
                tell(True)
            else:
                num_failures += 1
                if num_failures >= probe.failure_threshold:
                    tell(False)
            await asyncio.sleep(probe.period_seconds)

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self._changed()

    def _set_live(self, live: bool) -> None:
        self.not_live = self.not_live or not live


async def succeeds(client: httpx.AsyncClient, probe: Probe) -> bool:
    try:
        answer = await client.get(probe.path, timeout=probe.timeout_seconds)
    except httpx.TransportError:
        return False
    return 200 <= answer.status_code < 400
