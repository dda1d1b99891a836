"""The same application as replicas of Ray Serve: `serve run service.ray:app model=FOLDER no_auth=true`.

Each replica is a Ray actor that owns an engine with its own worker process, and drains it before it goes. There are as
many as the waiting and running requests ask for, by the gauges and the arithmetic of the Helm chart's scalers.
Arguments are settings, named as in the YAML file, and the fields of `Scaling`. Needs the extra `slimpajama[ray]`. The
one module that knows Ray: `app` runs where `serve run` does, `WorkInHand` in Ray's controller, the rest in replicas.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from service import logs
from service.app import create_app, package_version
from service.engine.assembly import make_engine
from service.engine.client import EngineClient
from service.metrics import Metrics
from service.settings import Settings, load_settings
from service.settings_sources import SettingsError, unknown_name

GRACE_SECONDS = 15
"""After the drain, as in the chart: for the last bytes of answers, and the worker's end."""
LOOK_BACK_SECONDS = 20
"""Replicas say every 10 s how much they have in hand."""
OF_THE_PROXY = frozenset(
    {
        "host", "port", "tls_certificate", "tls_key", "max_connections", "max_header_bytes", "header_timeout",
        "write_timeout", "keep_alive_timeout",
    }
)  # fmt: skip
"""Settings of our own server, in whose place Ray's proxy listens."""
GAUGES = {"waiting": "slimpajama_requests_waiting", "running": "slimpajama_requests_running"}


class Scaling(BaseModel):
    """How many replicas there are, and what one of them reserves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_waiting: float = Field(8, gt=0, description="waiting requests per replica beyond which one is added")
    target_running: float = Field(32, gt=0, description="running requests per replica beyond which one is added")
    upscale_seconds: float = Field(10, ge=0, description="that the load must be high before a replica comes")
    downscale_seconds: float = Field(300, ge=0, description="that the load must be low before a replica goes")
    num_cpus: float = Field(2, gt=0, description="reserved for a replica; also its threads, if worker_threads is unset")
    num_gpus: float = Field(0, ge=0, description="reserved for a replica")


class WorkInHand:
    """Ray's autoscaling policy: enough replicas that neither gauge exceeds its target on average."""

    def __init__(self, target_waiting: float, target_running: float) -> None:
        self._targets = {"waiting": target_waiting, "running": target_running}

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        seen = context.aggregated_metrics or {}
        wanted = [sum(seen.get(name, {}).values()) / target for name, target in self._targets.items()]
        return max(wanted), {}


class Replica:
    """One engine and the application around it. Ray calls everything here on one event loop."""

    def __init__(self, settings: Settings) -> None:
        logs.configure(settings.log_format, settings.log_level)
        self._metrics = Metrics(build_version=package_version())
        self._engine = make_engine(settings, self._metrics)
        self._app = create_app(settings, self._engine, registry=self._metrics)
        _load_before_the_first_request(self._app, self._engine)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Ray replaces a replica in which nobody would start a worker any more; ours replaces its own workers."""
        if not self._engine.alive:
            raise RuntimeError(self._engine.failure or "the engine has failed for good")

    def record_autoscaling_stats(self) -> dict[str, float]:
        gauges = self._metrics.registry.restricted_registry(list(GAUGES.values())).collect()
        totals = {family.name: sum(sample.value for sample in family.samples) for family in gauges}
        return {name: totals[gauge] for name, gauge in GAUGES.items()}


def _load_before_the_first_request(app: FastAPI, engine: EngineClient) -> None:
    """To Ray, a replica is ready once its lifespan has begun: that has to wait for the checkpoints."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app):
            await engine.wait_ready()
            yield

    app.router.lifespan_context = lifespan


def read_arguments(arguments: Mapping[str, Any]) -> tuple[Settings, Scaling]:
    """Raises SettingsError with advice; environment variables and a YAML file (`config=...`) count as for `serve`."""
    for name in arguments:
        if name not in Settings.model_fields and name not in Scaling.model_fields:
            raise SettingsError(unknown_name("argument", name, [*Settings.model_fields, *Scaling.model_fields]))
    try:
        scaling = Scaling(**{name: value for name, value in arguments.items() if name in Scaling.model_fields})
    except ValidationError as error:
        raise SettingsError("\n".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())) from error
    if scaling.min_replicas > scaling.max_replicas:
        raise SettingsError(f"min_replicas ({scaling.min_replicas}) is more than max_replicas ({scaling.max_replicas})")
    settings = load_settings({name: value for name, value in arguments.items() if name in Settings.model_fields})
    given = sorted(settings.model_fields_set & OF_THE_PROXY)
    if given:
        raise SettingsError(f"{given[0]} is not ours to set: Ray's proxy listens (http_options of Serve's config file)")
    if not settings.model:
        raise SettingsError("nothing to serve: give model=FOLDER_OR_GGUF_OR_HUB_NAME, or SLIMPAJAMA_MODEL")
    if not settings.has_keys and not settings.no_auth:
        raise SettingsError("Ray's proxy may listen to other machines: give api_keys_file=..., or no_auth=true")
    if settings.worker_threads is None:
        settings = settings.model_copy(update={"worker_threads": max(int(scaling.num_cpus), 1)})
    return settings, scaling


def app(arguments: dict[str, Any]) -> serve.Application:
    """What `serve run service.ray:app NAME=VALUE ...` and Serve's config files (`args:`) build."""
    settings, scaling = read_arguments(arguments)
    policy = {
        "policy_function": WorkInHand,
        "policy_kwargs": {"target_waiting": scaling.target_waiting, "target_running": scaling.target_running},
    }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="slimpajama",
        # Requests wait in our queue, whose gauge scales: not in Ray's, which knows neither limits nor deadlines.
        max_ongoing_requests=settings.max_queue_requests + settings.max_sequences + 1024,
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "policy": policy,
            "upscale_delay_s": scaling.upscale_seconds,
            "downscale_delay_s": scaling.downscale_seconds,
            "look_back_period_s": LOOK_BACK_SECONDS,
        },
        graceful_shutdown_timeout_s=settings.drain_timeout + GRACE_SECONDS,
        ray_actor_options={"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
    )
    return deployment.bind(settings)
