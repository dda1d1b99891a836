"""A real Prometheus scrapes two real replicas under load: every expression that we ship finds something there.

One worker is killed and the queue overflows on the way, so that the series of faults exist too. Then the smoke test of
`helm test` runs against a replica.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "slimpajama-tiny-lm"
PODS = ("slimpajama-7d4b9c6f5d-aaaaa", "slimpajama-7d4b9c6f5d-bbbbb")
PATIENCE_SECONDS = 240


def tool(name: str) -> str:
    unpacked = Path(sys.prefix) / "chart" / "prometheus" / "usr" / "bin" / name
    found = shutil.which(name) or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        pytest.skip(f"no {name}: `make chart-tools` unpacks Debian's prometheus")
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Replica:
    """`slimpajama serve` with a small queue, so that load overflows it."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "service", "serve", "--port", self.url.rpartition(":")[2]]
        command += ["--model", str(CHECKPOINT), "--worker-threads", "1", "--max-sequences", "2"]
        command += ["--max-queue-requests", "1"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None
            try:
                if httpx.get(self.url + "/readyz", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise TimeoutError(self.url)

    def kill_worker(self) -> None:
        for child in psutil.Process(self.process.pid).children():
            if "service.engine.worker" in child.cmdline():
                child.kill()


async def load(client: httpx.AsyncClient, replica: Replica, *, until: asyncio.Event) -> None:
    """Twenty callers for three places: most are refused. Streams, so that there are times between tokens."""

    async def call(number: int) -> None:
        while not until.is_set():
            body = {"model": CHECKPOINT.name, "prompt": "Once upon a time there was", "max_tokens": 40, "seed": number}
            async with client.stream("POST", replica.url + "/v1/completions", json=body | {"stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    pass
            await asyncio.sleep(0.05)

    await asyncio.gather(*(call(number) for number in range(20)))


class Prometheus:
    def __init__(self, folder: Path, replicas: list[Replica]) -> None:
        targets = [
            {"targets": [replica.url.removeprefix("http://")], "labels": {"namespace": "ai", "pod": pod}}
            for replica, pod in zip(replicas, PODS, strict=True)
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in (ROOT / "helm" / "rules").glob("*.yaml")],
            "scrape_configs": [{"job_name": "ai/slimpajama", "static_configs": targets}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def query(self, client: httpx.AsyncClient, expression: str) -> list[dict[str, Any]]:
        try:
            answer = await client.get(self.url + "/api/v1/query", params={"query": expression})
        except httpx.TransportError:
            return []
        if answer.status_code == 503:
            return []
        assert answer.status_code == 200, (expression, answer.text)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found


def measured(alert: str) -> list[str]:
    """The values of an alert, without the numbers they are held against: those a healthy service never reaches."""
    return [re.sub(r" (>|<|==) [0-9.]+$", "", part) for part in re.split(" and | unless ", alert)]


def expressions() -> list[str]:
    found: list[str] = []
    for path in (ROOT / "helm" / "rules").glob("*.yaml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                found += measured(rule["expr"]) if "alert" in rule else [rule["expr"], rule["record"]]
    for path in (ROOT / "helm" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            found += [target["expr"] for target in panel.get("targets", [])]
    found = [re.sub(r"\$(namespace|job|model|task)", ".*", text.replace("$__rate_interval", "1m")) for text in found]
    return [text for text in found if not text.startswith("absent(")]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[Replica]]:
    tool("prometheus")
    started = [Replica(), Replica()]
    try:
        for replica in started:
            replica.until_ready()
        yield started
    finally:
        for replica in started:
            replica.process.terminate()
        for replica in started:
            replica.process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_every_expression_finds_something_in_two_replicas_under_load(
    chart: Any, client: httpx.AsyncClient, replicas: list[Replica], tmp_path: Path
) -> None:
    prometheus = Prometheus(tmp_path, replicas)
    done = asyncio.Event()
    callers = [asyncio.create_task(load(client, replica, until=done)) for replica in replicas]
    scaler = chart.only(chart.ci("keda-values.yaml"), "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"]]
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Prometheus tells nobody when it has scraped: it has to be asked again and again.
            while len(await prometheus.query(client, "slimpajama_generated_tokens_total > 0")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            replicas[0].kill_worker()
        missing = expressions()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while missing:
                    missing = [text for text in missing if not await prometheus.query(client, text)]
                    await asyncio.sleep(1)
        except TimeoutError:
            pytest.fail("nothing is found by\n" + "\n".join(missing))
        assert await prometheus.query(client, "absent(slimpajama_worker_up) == 1") == []
        for query in queries:
            assert len(await prometheus.query(client, query)) == 1, query
            unsummed = query.removeprefix("sum(").removesuffix(")")
            assert len(await prometheus.query(client, unsummed)) == 2, "the sum is needed: KEDA refuses two elements"
        await check_adapter(client, prometheus)
        for replica in replicas:
            await check_metrics(client, replica)
    finally:
        done.set()
        await asyncio.gather(*callers, return_exceptions=True)
        prometheus.process.terminate()
        await asyncio.to_thread(prometheus.process.wait, 30)
    for caller in callers:
        assert caller.exception() is None


async def check_adapter(client: httpx.AsyncClient, prometheus: Prometheus) -> None:
    """prometheus-adapter finds both gauges by the documented rule, and one value of each for every pod."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (rule,) = yaml.safe_load(re.findall(r"```yaml\n(rules:.*?)```", text, re.DOTALL)[0])["rules"]
    series = {found["metric"]["__name__"] for found in await prometheus.query(client, rule["seriesQuery"])}
    assert series == {"slimpajama_requests_waiting", "slimpajama_requests_running"}
    for name in series:
        filled = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
        found = await prometheus.query(client, filled.replace("<<.LabelMatchers>>", 'namespace="ai"'))
        assert {element["metric"]["pod"] for element in found} == set(PODS), filled


async def check_metrics(client: httpx.AsyncClient, replica: Replica) -> None:
    """promtool's own idea of good names, types and help."""
    text = (await client.get(replica.url + "/metrics")).text
    command = [tool("promtool"), "check", "metrics"]
    checked = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stderr == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_helm_test_is_content_with_a_replica(replicas: list[Replica]) -> None:
    command = [sys.executable, str(ROOT / "helm" / "files" / "smoke.py")]
    environment = os.environ | {"SMOKE_URL": replicas[0].url}
    done = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["ok: ready", "ok: metrics", "ok: metrics can be read", "ok: models",
                                        f"ok: {CHECKPOINT.name}: /v1/completions"]  # fmt: skip
