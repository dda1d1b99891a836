"""The engine as the API process knows it: submit, stream, cancel; every accepted request ends exactly once.

Accepted requests wait in a fair queue, are handed to the worker as it has room, and are kept here until they have
ended: when a worker dies they go back to the queue and are run again from where they were. Knows tokens, not text.
Runs in the API process, on its event loop.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec

from model.errors import CheckpointError
from service.engine.accounting import Accounting
from service.engine.dispatch import Dispatcher
from service.engine.flight import EncodeFlight, EncodeRequest, Flight, GenerateFlight, GenerateRequest, trace_context
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import (
    GRAMMAR_ERROR,
    Cancel,
    EncodeResult,
    FromWorker,
    Loaded,
    LoadFailed,
    Loading,
    Step,
    TokenOutput,
    Unload,
    WorkerConfig,
)
from service.engine.self_test import TASK as SELF_TEST
from service.engine.shadow import SHADOW_CLIENT, SHADOW_PRIORITY, Comparison
from service.engine.supervisor import Supervisor, SupervisorLimits
from service.engine.versions import Prepare, Versions
from service.errors import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidGrammar,
    Quarantined,
    ServiceError,
    Unavailable,
    WorkerLost,
)

log = logging.getLogger("slimpajama.engine")

EngineState = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]
GUILTY_DEATHS = 3


class GenerationStream:
    """The tokens of one request as they come. Not finishing the iteration means cancelling: call `aclose`."""

    def __init__(self, flight: GenerateFlight, client: "EngineClient") -> None:
        self._flight = flight
        self._client = client

    def __aiter__(self) -> "GenerationStream":
        return self

    async def __anext__(self) -> TokenOutput:
        flight = self._flight
        while flight.unread is None:
            if flight.error is not None:
                raise flight.error
            if flight.outcome is not None:
                raise StopAsyncIteration
            await flight.changed()
        output, flight.unread = flight.unread, None
        return output

    @property
    def timings(self) -> Flight:
        """When the request was accepted, started and answered first; how many tokens it took and gave."""
        return self._flight

    def cancel(self, outcome: str = "cancelled") -> None:
        """Ends the request if it has not ended; its blocks are free before the worker's next step.

        `outcome` is "stop" where the caller has all it wanted (a stop string), which is no cancellation.
        """
        self._client.end(self._flight, outcome)

    async def aclose(self) -> None:
        self.cancel()


class EngineClient:
    """Owns the flights. Implements the supervisor's `WorkerEvents`."""

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
        self._flights: dict[int, Flight] = {}
        self._dispatcher = Dispatcher(worker_config)
        self.supervisor = Supervisor(self._worker_config, self, limits)
        self.versions = Versions(self, prepare)
        self._preparing: asyncio.Task[None] | None = None
        self.on_loading: Callable[[Loading], None] = lambda _message: None
        self._settled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

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
        self.supervisor.start()

    def _worker_config(self) -> WorkerConfig:
        return msgspec.structs.replace(self._config, models=[model.spec for model in self.models.everything()])

    async def drain(self, timeout_seconds: float) -> None:
        """Accepts nothing more, lets accepted requests finish, and fails those that have not after the timeout."""
        if self.state not in ("failed", "stopped"):
            self.state = "draining"
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_seconds)
        except TimeoutError:
            self._fail_all(Unavailable("the service is shutting down and the request did not finish in time"))

    async def stop(self) -> None:
        self._fail_all(Unavailable("the service is shutting down"))
        if self.state != "failed":
            self.state = "stopped"
        await self.versions.stop("the service is shutting down")
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        await self.supervisor.stop()

    @property
    def alive(self) -> bool:
        """Whether there is still somebody who would start a worker: false is what a liveness probe waits for."""
        if self.state in ("failed", "stopped"):
            return False
        return self.supervisor.alive or self._preparing is None or not self._preparing.done()

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    # -- requests -----------------------------------------------------------------------------------------------------

    def generate(self, request: GenerateRequest) -> GenerationStream:
        """Accepts a request and returns its stream.

        Raises:
            Overloaded, Unavailable: it was not accepted.
        """
        flight = self._generate_flight(request, self._model_of(request.model))
        self._accept(flight)
        self._shadow(flight)
        return GenerationStream(flight, self)

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]:
        """One pass over each input; an input's own fault is in its result, a fault of the whole request is raised."""
        flight = self._encode_flight(request, self._model_of(request.model))
        self._accept(flight)
        self._shadow(flight)
        try:
            while flight.outcome is None:
                await flight.changed()
        finally:
            self.end(flight, "cancelled")
        if flight.error is not None:
            raise flight.error
        return [result for result in flight.results if result is not None]

    def end(self, flight: Flight, outcome: str, error: ServiceError | None = None) -> None:
        """Ends a flight from this side (cancelled, deadline, stop string); nothing happens if it has ended."""
        if flight.outcome is None:
            if flight.dispatched:
                self.supervisor.send(Cancel(flight.number))
            flight.stopped_here = outcome == "stop"
            self._finish(flight, outcome, error)
            self._pump()

    def _model_of(self, key: str) -> LoadedModel:
        """Bound here: whatever is switched later, the request ends with the version that it began with."""
        model = self.models.by_key(key)
        assert model is not None, "whoever resolved the name holds the version, and so it is still known"
        return model

    def _generate_flight(self, request: GenerateRequest, model: LoadedModel) -> GenerateFlight:
        num_prompt = len(request.prompt_ids) + len(request.encoder_ids)
        cost = num_prompt + request.sampling.max_tokens
        return GenerateFlight(request=request, **self._common(request, model, num_prompt_tokens=num_prompt, cost=cost))

    def _encode_flight(self, request: EncodeRequest, model: LoadedModel) -> EncodeFlight:
        num_prompt = sum(len(entry.ids) for entry in request.inputs)
        common = self._common(request, model, num_prompt_tokens=num_prompt, cost=num_prompt)
        return EncodeFlight(request=request, results=[None] * len(request.inputs), **common)

    def _common(
        self, request: GenerateRequest | EncodeRequest, model: LoadedModel, *, num_prompt_tokens: int, cost: int
    ) -> dict[str, Any]:
        return {
            "number": next(self._numbers),
            "model": model,
            "task": request.task,
            "client": request.client,
            "priority": request.priority,
            "cost_tokens": cost,
            "num_prompt_tokens": num_prompt_tokens,
            "accepted": time.monotonic(),
            "deadline": request.deadline,
            "trace": trace_context.get(),
        }

    def _shadow(self, flight: Flight) -> None:
        """Runs an accepted request again on the shadow of its version, where it has one and nobody waits."""
        model = self.models.shadow_of(flight.model)
        if model is None or flight.task == SELF_TEST:
            return
        count = partial(self._books.metrics.shadowed, model=model.name, version=model.version)
        if self._dispatcher.load("").num_requests:
            count(outcome="skipped")
            return
        twin: Flight
        if isinstance(flight, GenerateFlight):
            twin = self._generate_flight(flight.request, model)
        else:
            assert isinstance(flight, EncodeFlight)
            twin = self._encode_flight(flight.request, model)
        twin.client, twin.priority, twin.trace = SHADOW_CLIENT, SHADOW_PRIORITY, None
        Comparison(
            flight, twin, count=lambda outcome: count(outcome=outcome), cancel=lambda lost: self.end(lost, "cancelled")
        )
        self._enter(twin)

    def _accept(self, flight: Flight) -> None:
        now = flight.accepted
        if self.state in ("starting", "draining", "failed", "stopped"):
            self._books.metrics.rejected(self.state)
            raise Unavailable(f"the service is {self.state}", retry_after=2.0)
        if flight.deadline is not None and flight.deadline <= now:
            self._books.metrics.rejected("deadline")
            raise DeadlineExceeded("the deadline had passed when the request arrived", param="timeout")
        load = self._dispatcher.load(flight.client)
        self._books.admit(load, num_tokens=flight.cost_tokens, client=flight.client, now=now)
        self._enter(flight)

    def _enter(self, flight: Flight) -> None:
        self._books.accepted(flight)
        self._flights[flight.number] = flight
        self._empty.clear()
        if flight.deadline is not None:
            seconds = flight.deadline - flight.accepted
            flight.deadline_timer = asyncio.get_running_loop().call_later(seconds, self._expire, flight)
        self._dispatcher.enqueue(flight)
        self._pump()

    def _expire(self, flight: Flight) -> None:
        self.end(flight, "deadline", DeadlineExceeded("the request's deadline passed before it was finished"))

    def _pump(self) -> None:
        """Hands the worker what it has room for, of the checkpoints that it holds."""
        if self.state not in ("ready", "restarting", "draining"):
            return
        for flight in self._dispatcher.take(self._is_loaded):
            flight.dispatched = True
            self.supervisor.send(flight.message())

    def _is_loaded(self, key: str) -> bool:
        model = self.models.by_key(key)
        return model is not None and model.loaded is not None

    def _finish(self, flight: Flight, outcome: str, error: ServiceError | None = None) -> None:
        del self._flights[flight.number]
        self._dispatcher.forget(flight)
        now = time.monotonic()
        flight.end(outcome, error)
        self._books.finished(flight, outcome, now)
        if not self._flights:
            self._empty.set()

    def _fail_all(self, error: ServiceError) -> None:
        for flight in list(self._flights.values()):
            if flight.dispatched:
                self.supervisor.send(Cancel(flight.number))
            self._finish(flight, "error", error)

    # -- the worker's messages ----------------------------------------------------------------------------------------

    def on_message(self, message: FromWorker) -> None:
        match message:
            case Step():
                self._on_step(message)
            case Loading():
                self.on_loading(message)
            case Loaded():
                self._on_loaded(message)
            case LoadFailed():
                self._on_load_failed(message)
            case _:
                log.info("unloaded", extra={"model": message.model})

    def _on_step(self, step: Step) -> None:
        now = time.monotonic()
        for number in step.started_ids:
            flight = self._flights.get(number)
            if flight is not None and flight.started is None:
                self._books.started(flight, now - step.stats.step_seconds)
        for output in step.tokens:
            flight = self._flights.get(output.request_id)
            if isinstance(flight, GenerateFlight):
                self._on_tokens(flight, output, now)
        for result in step.encoded:
            flight = self._flights.get(result.request_id)
            if isinstance(flight, EncodeFlight):
                self._on_encoded(flight, result)
        self._pump()
        model = self.models.by_key(step.model)
        if model is not None:
            self._books.step(model, step, self._dispatcher.waiting_in(step.model))

    def _on_tokens(self, flight: GenerateFlight, output: TokenOutput, now: float) -> None:
        if output.error is not None:
            grammar = output.error.startswith(GRAMMAR_ERROR)
            self._finish(flight, "error", (InvalidGrammar if grammar else GenerationFailed)(output.error))
            return
        if output.token_ids:
            self._dispatcher.made_progress(flight)
            self._books.tokens(flight, len(output.token_ids), now)
        flight.num_cached_tokens = max(flight.num_cached_tokens, output.num_cached_tokens)
        flight.deliver(output)
        match output.finish_reason:
            case None:
                pass
            case "deadline":
                self._finish(
                    flight, "deadline", DeadlineExceeded("the deadline passed before the request was finished")
                )
            case reason:
                self._finish(flight, reason)

    def _on_encoded(self, flight: EncodeFlight, result: EncodeResult) -> None:
        self._dispatcher.made_progress(flight)
        if result.reason == "deadline":
            self._finish(flight, "deadline", DeadlineExceeded("the deadline passed before the request was finished"))
        else:
            result.started = flight.started
            if flight.deliver(result):
                self._finish(flight, "stop")

    def _on_loaded(self, message: Loaded) -> None:
        model = self.models.by_key(message.model)
        if model is None:
            self.supervisor.send(Unload(message.model))  # given up while it was being loaded
            return
        model.loaded = message
        if model.state == "loading":
            model.state = "ready"
        self._books.model_loaded(model)
        self.versions.loaded(model)
        self._note_ready()
        self._pump()

    def _note_ready(self) -> None:
        """Ready is when all that is served is; what is being loaded beside it changes nothing."""
        if self.models and all(model.loaded is not None for model in self.models.values()):
            if self.state in ("starting", "restarting"):
                self.state = "ready"
            self._books.metrics.worker_up(True)
            self._settled.set()

    def _on_load_failed(self, message: LoadFailed) -> None:
        log.critical("checkpoint does not load", extra={"model": message.model, "reason": message.message})
        model = self.models.by_key(message.model)
        if model is None:
            return
        model.state = "failed"
        if model in self.models.values():
            self._give_up(f"{message.model}: {message.message}")
        else:
            self.versions.load_failed(model, message.message)
            self.fail_requests_of(model.key, WorkerLost(f"{model.key} was replaced, and could not be loaded again"))

    def fail_requests_of(self, key: str, error: ServiceError) -> None:
        for flight in self._dispatcher.of(key):
            self.end(flight, "error", error)

    def num_requests_of(self, key: str) -> int:
        return self._dispatcher.num_of(key)

    def unload(self, name: str, version: str, key: str) -> None:
        """Frees a version that nobody uses any more, in the worker and in the books."""
        self._dispatcher.drop(key)
        self.supervisor.send(Unload(key))
        self._books.metrics.forget_model(model=name, version=version)

    # -- the worker's life --------------------------------------------------------------------------------------------

    def on_worker_up(self) -> None:
        pass

    def on_worker_down(self, cause: str) -> None:
        """Puts back to the queue what the worker had; convicts a request that keeps dying where nothing else does."""
        self._books.metrics.worker_up(False)
        self._books.metrics.worker_restarted(cause)
        if self.state == "ready":
            self.state = "restarting"
        for model in self.models.everything():
            model.loaded = None
            if model.state == "ready":
                model.state = "loading"
        self.versions.worker_died()
        for flight in self._dispatcher.take_back():
            flight.dispatched = False
            if flight.deaths_without_progress >= GUILTY_DEATHS:
                error = Quarantined("the worker died each time it ran this request; it will not be tried again")
                self._finish(flight, "error", error)
                continue
            self._books.replayed(flight)
            self._dispatcher.enqueue(flight)

    def on_budget_spent(self) -> None:
        self._give_up("the worker died more often than the restart budget allows")

    def _give_up(self, reason: str) -> None:
        self.state, self.failure = "failed", reason
        self.versions.give_up(f"the worker is gone: {reason}")
        self._fail_all(WorkerLost(f"the worker is gone: {reason}", retry_after=5.0))
        self._settled.set()
