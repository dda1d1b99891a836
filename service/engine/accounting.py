"""The engine's books: who may join the queue, and what each request and each step is counted as.

Translates flights and steps into `service.metrics`, `service.admission` and spans; decides nothing else. API process
only.
"""

from service.admission import DrainRate, QueueFull, QueueLimits, QueueLoad
from service.engine.flight import Flight
from service.engine.models import LoadedModel
from service.engine.protocol import Step
from service.metrics import Metrics, ModelMetrics, RequestMetrics


class Accounting:
    def __init__(self, metrics: Metrics, limits: QueueLimits, now: float) -> None:
        self.metrics = metrics
        self._limits = limits
        self._drain_rate = DrainRate(now)

    def admit(self, load: QueueLoad, *, num_tokens: int, client: str, now: float) -> None:
        """Raises QueueFull, with the seconds after which a retry should find room."""
        retry_after = self._drain_rate.retry_after(load.num_tokens + num_tokens, now)
        try:
            self._limits.check(load, num_tokens=num_tokens, client=client, retry_after=retry_after)
        except QueueFull as error:
            self.metrics.rejected(error.cause)
            raise

    def accepted(self, flight: Flight) -> None:
        self._of(flight).accepted()

    def started(self, flight: Flight, now: float) -> None:
        """Replays are not counted twice: a flight starts once."""
        flight.started = now
        self._of(flight).queued(now - flight.accepted)

    def tokens(self, flight: Flight, num_tokens: int, now: float) -> None:
        series = self._of(flight)
        if flight.first_output is None:
            flight.first_output = now
            series.first_token(now - flight.accepted)
            series.prefilled(now - (flight.started or flight.accepted))
        elif flight.last_output is not None:
            series.inter_token(now - flight.last_output)
        flight.last_output = now
        flight.num_output_tokens += num_tokens
        series.tokens(generated=num_tokens)

    def finished(self, flight: Flight, outcome: str, now: float) -> None:
        series = self._of(flight)
        series.outcome(outcome, seconds=now - flight.accepted)
        if flight.started is not None:
            series.tokens(prompt=flight.num_prompt_tokens, cached=flight.num_cached_tokens)
            series.lengths(prompt=flight.num_prompt_tokens, generated=flight.num_output_tokens or None)
        if flight.first_output is not None:
            series.decoded(now - flight.first_output)
        self._drain_rate.record(flight.cost_tokens, now)
        if flight.trace is not None:
            flight.trace.add_flight(flight, now)

    def replayed(self, flight: Flight) -> None:
        flight.num_replays += 1
        self.metrics.replayed()

    def step(self, model: LoadedModel, step: Step, num_waiting_here: int) -> None:
        stats = step.stats
        series = self._lane(model)
        series.load(
            waiting=stats.num_waiting + num_waiting_here,
            running=stats.num_running,
            kv_cache_usage=stats.kv_cache_usage,
        )
        if stats.step_tokens:
            series.step(
                seconds=stats.step_seconds,
                forward_seconds=stats.forward_seconds,
                tokens=stats.step_tokens,
                sequences=stats.step_sequences,
                preempted=stats.num_preempted,
                drafted=stats.num_drafted,
                accepted=stats.num_confirmed,
            )

    def model_loaded(self, model: LoadedModel) -> None:
        assert model.loaded is not None
        self.metrics.model_loaded(
            model=model.name,
            version=model.version,
            architecture=model.description.architecture,
            dtype=model.loaded.dtype,
            device=model.loaded.device,
        )
        lane = self._lane(model)
        lane.load(waiting=0, running=0)
        lane.memory(
            weight_bytes=model.loaded.weight_bytes,
            kv_cache_bytes=model.loaded.kv_cache_bytes,
            num_blocks=model.loaded.num_blocks if model.base is None else 0,
            block_tokens=model.loaded.block_size,
        )

    def _of(self, flight: Flight) -> RequestMetrics:
        return self.metrics.request_metrics(model=flight.model.name, version=flight.model.version, task=flight.task)

    def _lane(self, model: LoadedModel) -> ModelMetrics:
        return self.metrics.model_metrics(model=model.name, version=model.version)
