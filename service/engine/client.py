"""The engine as the API process knows it: submit, stream, cancel, and the states that it goes through.

Binds requests to checkpoints and hands them to the ledger, which keeps them until they have ended; starts, drains and
stops; and hears from the supervisor what the worker says and when it dies. Knows tokens, not text. Runs in the API
process, on its event loop.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

import msgspec

from model.errors import CheckpointError
from service.engine.accounting import Accounting
from service.engine.deployment import Prepare
from service.engine.dispatch import Dispatcher
from service.engine.flight import (
    EncodeRequest,
    Flight,
    GenerateRequest,
    encode_flight,
    generate_flight,
)
from service.engine.ledger import Ledger
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import (
    EncodeResult,
    FromWorker,
    Loaded,
    LoadFailed,
    Loading,
    Step,
    Unload,
    WorkerConfig,
)
from service.engine.self_test import TASK as SELF_TEST
from service.engine.shadow import SHADOW_CLIENT, SHADOW_PRIORITY, Comparison
from service.engine.stream import GenerationStream
from service.engine.supervisor import Supervisor, SupervisorLimits
from service.engine.versions import Versions
from service.errors import ServiceError, Unavailable, WorkerLost

log = logging.getLogger("slimpajama.engine")

EngineState = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]


class EngineClient:
    """Implements the supervisor's `WorkerEvents` and the versions' `Owner`."""

    def __init__(
        self,
        load_directory: Callable[[], ModelDirectory],
        worker_config: WorkerConfig,
        limits: SupervisorLimits,
        accounting: Accounting,
        prepare: Prepare | None = None,
    ) -> None:
        """`load_directory` finds the checkpoints and may take its time; it is called on a thread. So is `prepare`, for
        a checkpoint that is to be served later."""
        self.models = ModelDirectory()
        self._load_directory = load_directory
        self._config = worker_config
        self.state: EngineState = "starting"
        self.failure: str | None = None
        self._books = accounting
        self._numbers = itertools.count(1)
        self.supervisor = Supervisor(self._worker_config, self, limits)
        self._dispatcher = Dispatcher(worker_config)
        self._ledger = Ledger(self._dispatcher, accounting, send=self.supervisor.send, is_loaded=self._is_loaded)
        self.versions = Versions(self, prepare)
        self._preparing: asyncio.Task[None] | None = None
        self.on_loading: Callable[[Loading], None] = lambda _message: None
        self._settled = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins loading and returns at once; `wait_ready` waits for the checkpoints, `state` tells how it goes."""
        self._preparing = asyncio.get_running_loop().create_task(self._prepare(), name="prepare")

    async def wait_ready(self) -> None:
        """Raises ServiceError with the reason if a checkpoint does not load."""
        await self._settled.wait()
        if self.failure is not None:
            raise WorkerLost(self.failure)

    async def _prepare(self) -> None:
        try:
            self.models = await asyncio.to_thread(self._load_directory)
        except CheckpointError as error:
            log.critical("checkpoint cannot be used", extra={"reason": str(error)})
            self._give_up(str(error))
            return
        except Exception as error:
            log.exception("a fault while the checkpoints were read")
            self._give_up(f"{type(error).__name__}: {error}")
            return
        self.supervisor.start()

    def _worker_config(self) -> WorkerConfig:
        specs = [model.spec for model in self.models.everything()]
        # Adapters last: the checkpoints whose weights they share have to be there.
        specs.sort(key=lambda spec: spec.shares is not None)
        return msgspec.structs.replace(self._config, models=specs)

    async def drain(self, timeout_seconds: float) -> None:
        """Accepts nothing more, lets accepted requests finish, and fails those that have not after the timeout."""
        if self.state not in ("failed", "stopped"):
            self.state = "draining"
        try:
            await asyncio.wait_for(self._ledger.until_empty(), timeout_seconds)
        except TimeoutError:
            self._ledger.fail_all(Unavailable("the service is shutting down and the request did not finish in time"))

    async def stop(self) -> None:
        self._ledger.fail_all(Unavailable("the service is shutting down"))
        if self.state != "failed":
            self.state = "stopped"
        await self.versions.stop("the service is shutting down")
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        await self.supervisor.stop()
        log.info("books closed", extra=self._books.metrics.totals())

    @property
    def alive(self) -> bool:
        """Whether there is still somebody who would start a worker: false is what a liveness probe waits for."""
        if self.state in ("failed", "stopped"):
            return False
        return self.supervisor.alive or self._preparing is None or not self._preparing.done()

    @property
    def num_in_flight(self) -> int:
        return len(self._ledger)

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    # -- requests -----------------------------------------------------------------------------------------------------

    def generate(self, request: GenerateRequest) -> GenerationStream:
        """Accepts a request and returns its stream.

        Raises:
            Overloaded, Unavailable: it was not accepted.
        """
        flight = generate_flight(request, self._model_of(request.model), next(self._numbers))
        self._accept(flight)
        return GenerationStream(flight, self._ledger.end)

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]:
        """One pass over each input; an input's own fault is in its result, a fault of the whole request is raised."""
        flight = encode_flight(request, self._model_of(request.model), next(self._numbers))
        self._accept(flight)
        try:
            while flight.outcome is None:
                await flight.changed()
        finally:
            self._ledger.end(flight, "cancelled")
        if flight.error is not None:
            raise flight.error
        return [result for result in flight.results if result is not None]

    def _model_of(self, key: str) -> LoadedModel:
        """Bound here: whatever is switched later, the request ends with the version that it began with."""
        model = self.models.by_key(key)
        assert model is not None, "whoever resolved the name holds the version, and so it is still known"
        return model

    def _accept(self, flight: Flight) -> None:
        if self.state in ("starting", "draining", "failed", "stopped"):
            self._books.metrics.rejected(self.state)
            raise Unavailable(f"the service is {self.state}", retry_after=2.0)
        if _is_lost(flight.model):
            self._books.metrics.rejected("failed")
            raise Unavailable(f"{flight.model.key} could not be loaded again", retry_after=30.0)
        if flight.errand is not None and flight.errand.under_way:
            self._ledger.enter(flight)  # it takes the place of what has ended
        else:
            self._ledger.admit(flight)
        self._shadow(flight)

    def _shadow(self, flight: Flight) -> None:
        """Runs an accepted request again on the shadow of its version, where it has one and nobody waits."""
        model = self.models.shadow_of(flight.model)
        if model is None or flight.task == SELF_TEST:
            return
        count = partial(self._books.metrics.shadowed, model=model.name, version=model.version)
        if self._dispatcher.load("").num_requests:
            count(outcome="skipped")
            return
        twin = flight.again(model, next(self._numbers))
        twin.client, twin.priority, twin.trace, twin.errand = SHADOW_CLIENT, SHADOW_PRIORITY, None, None
        Comparison(
            flight,
            twin,
            count=lambda outcome: count(outcome=outcome),
            cancel=lambda lost: self._ledger.end(lost, "cancelled"),
        )
        self._ledger.enter(twin)

    def _is_loaded(self, key: str) -> bool:
        """Whether the worker holds the checkpoint, and those adapters that share it and have requests, and may be given
        them."""
        model = self.models.by_key(key)
        if self.state not in ("ready", "restarting", "draining") or model is None or model.loaded is None:
            return False
        return not any(
            adapter.loaded is None and adapter.state != "failed" and self._dispatcher.num_of(adapter.key)
            for adapter in self.models.everything()
            if adapter.base is model
        )

    # -- the worker's messages ----------------------------------------------------------------------------------------

    def on_message(self, message: FromWorker) -> None:
        match message:
            case Step():
                self._ledger.take_step(message, self.models.by_key(message.model))
            case Loading():
                self.on_loading(message)
            case Loaded():
                self._on_loaded(message)
            case LoadFailed():
                self._on_load_failed(message)
            case _:
                log.info("unloaded", extra={"model": message.model})

    def _on_loaded(self, message: Loaded) -> None:
        model = self.models.by_key(message.model)
        if model is None:
            self.supervisor.send(Unload(message.model))  # given up while it was being loaded
            self._ledger.pump()  # whom its base's line waited for
            return
        model.loaded = message
        model.step_tokens = message.max_step_tokens
        if model.state == "loading":
            model.state = "ready"
        self._books.model_loaded(model)
        self.versions.probation.loaded(model)
        self._note_ready()
        self._ledger.pump()

    def _note_ready(self) -> None:
        """Ready is when all that is served is; what is being loaded beside it changes nothing."""
        if self.models and all(model.loaded is not None or _is_lost(model) for model in self.models.values()):
            if self.state in ("starting", "restarting"):
                self.state = "ready"
            self._books.metrics.worker_up(True)
            self._settled.set()

    def _on_load_failed(self, message: LoadFailed) -> None:
        log.critical("checkpoint does not load", extra={"model": message.model, "reason": message.message})
        model = self.models.by_key(message.model)
        if model is None:
            self._ledger.pump()
            return
        model.state = "failed"
        if model.base is not None and self.state != "starting":  # its base goes on, and its other adapters
            self.versions.probation.load_failed(model, message.message)
            self.fail_requests_of(model.key, WorkerLost(f"{model.key} could not be loaded again"))
            self._note_ready()
            self._ledger.pump()
        elif model in self.models.values():
            self._give_up(f"{message.model}: {message.message}")
        else:
            self.versions.probation.load_failed(model, message.message)
            self.fail_requests_of(model.key, WorkerLost(f"{model.key} was replaced, and could not be loaded again"))

    def fail_requests_of(self, key: str, error: ServiceError) -> None:
        self._ledger.fail_of(key, error)

    def num_requests_of(self, key: str) -> int:
        return self._dispatcher.num_of(key)

    def unload(self, name: str, version: str, key: str) -> None:
        """Frees a version that nobody uses any more, in the worker and in the books."""
        self._dispatcher.drop(key)
        self.supervisor.send(Unload(key))
        self._books.metrics.forget_model(model=name, version=version)

    # -- the worker's life --------------------------------------------------------------------------------------------

    def on_worker_down(self, cause: str, batch: frozenset[int] | None) -> None:
        self._books.metrics.worker_up(False)
        self._books.metrics.worker_restarted(cause)
        if self.state == "ready":
            self.state = "restarting"
        for model in self.models.everything():
            model.loaded = None
            if model.state == "ready" or _is_lost(model):
                model.state = "loading"
        self.versions.probation.worker_died()
        self._ledger.take_back(batch)

    def on_budget_spent(self) -> None:
        self._give_up("the worker died more often than the restart budget allows")

    def _give_up(self, reason: str) -> None:
        self.state, self.failure = "failed", reason
        self.versions.probation.give_up(f"the worker is gone: {reason}")
        self._ledger.fail_all(WorkerLost(f"the worker is gone: {reason}", retry_after=5.0))
        self._settled.set()


def _is_lost(model: LoadedModel) -> bool:
    """An adapter that could not be read again after a worker's death; the next one tries anew."""
    return model.base is not None and model.state == "failed"
