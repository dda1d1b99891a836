"""A generating checkpoint in the worker: scheduler over runner, grammars compiled beside it, faults contained.

With `look_ahead` a step is made and launched while the device still runs the one before, whose results are taken
afterwards: scheduling costs the device nothing. Where the next step has to see the results first it waits for them.
Knows messages, sequences and steps; not weights (the runner's) and not blocks (the scheduler's). Worker process, main
thread; only grammar compilation happens elsewhere, and reports back through `GrammarCompiler.done`.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count

from model.adapters.low_rank import AdapterWeights
from model.batch import Batch
from model.grammar import GrammarCompiler
from model.runner import LaunchedStep, Runner, is_out_of_memory
from service.engine.protocol import Encode, Generate, LaneStats, Loaded, Step, TokenOutput
from service.engine.scheduler import Scheduler
from service.engine.sequence import sequence_from

log = logging.getLogger("slimpajama.worker")


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step whose results are awaited."""

    batch: Batch
    launched: LaunchedStep


class GenerationLane:
    """Implements `Lane`."""

    def __init__(
        self,
        loaded: Loaded,
        scheduler: Scheduler,
        runner: Runner,
        grammars: GrammarCompiler,
        *,
        look_ahead: bool = False,
    ) -> None:
        self.loaded = loaded
        self.busy_seconds = 0.0
        self.on_batch: Callable[[Collection[int]], None] = lambda _ids: None
        self._scheduler = scheduler
        self._runner = runner
        self._adapters: dict[str, int] = {}
        """What the runner calls each adapter, by key: another number each time that one is loaded, since blocks that an
        earlier one of that key filled may still be in the cache."""
        self._adapter_numbers = count(1)
        self._grammars = grammars
        self._look_ahead = look_ahead
        self._flight: StepInFlight | None = None
        self._landed: Batch | None = None
        """The batch whose results the step last made took."""
        self._unstarted: set[int] = set()
        self._outbox: list[TokenOutput] = []
        self._out_of_memory = False
        """Whether that was why the last step that failed did."""
        self._max_batch_tokens = scheduler.max_batch_tokens
        self._began = 0.0
        """When the step being made was begun."""

    @property
    def has_work(self) -> bool:
        waits = bool(self._outbox) or self._flight is not None
        return waits or self._scheduler.has_work or self._grammars.any_done

    @property
    def next_step_tokens(self) -> int:
        return self._scheduler.next_step_tokens

    def submit(self, message: Generate | Encode, now: float) -> None:
        if isinstance(message, Encode):
            raise ValueError(f"checkpoint '{message.model}' generates; it has no single-pass output")
        adapter = self._adapters.get(message.adapter)
        if message.adapter and adapter is None:
            raise ValueError(f"adapter '{message.adapter}' is not loaded")
        refused = self._scheduler.add(sequence_from(message, adapter), now)
        if refused is not None:
            self._outbox.append(refused)
            return
        self._unstarted.add(message.request_id)
        if message.sampling.grammar is not None:
            self._grammars.start(message.request_id, message.sampling.grammar, message.output_ids)

    def cancel(self, request_id: int) -> bool:
        cancelled = self._scheduler.cancel(request_id)
        self._forget(request_id)
        return cancelled is not None

    def step(self, now: float, *, alone: bool = False) -> Step:  # noqa: ARG002
        delivered, self._outbox = self._outbox, []
        self._began = time.monotonic()
        self._landed = None
        if self._flight is not None and not self._scheduler.can_look_ahead:
            delivered += self._land()
        if self._flight is None:
            # Who is in a step in flight still gets what it gives: deadlines are looked at when it lands.
            delivered += self._forget_ended(self._scheduler.expire(now))
        delivered += self._take_grammars()
        batch = self._scheduler.schedule(now)
        started_ids = self._newly_started()  # before those are forgotten that end with their first step
        if self._flight is None:  # else there are two steps that may be at fault
            self.on_batch(self._scheduler.step_request_ids)
        self._note_smaller_steps()
        launched = self._launch(batch)
        delivered += self._land()
        delivered += self._follow(batch, launched)
        if not self._look_ahead:
            delivered += self._land()
        seconds = time.monotonic() - now
        self.busy_seconds += seconds
        return Step(
            model=self.loaded.model,
            started_ids=started_ids,
            tokens=delivered,
            stats=self._stats(seconds),
        )

    def report(self) -> Step:
        self._landed = None
        return Step(model=self.loaded.model, stats=self._stats(0.0))

    def close(self) -> Step:
        return self._failed(self._scheduler.request_ids)

    def add_adapter(self, key: str, weights: AdapterWeights) -> None:
        """From now on requests may name it."""
        number = self._adapters[key] = next(self._adapter_numbers)
        self._runner.adapters[number] = weights

    def drop_adapter(self, key: str) -> Step:
        """Fails what is left of its requests."""
        number = self._adapters.pop(key)
        left = self._scheduler.request_ids_of(number)
        for request_id in left:
            self.cancel(request_id)
        del self._runner.adapters[number]
        return self._failed(left)

    def _failed(self, request_ids: Collection[int]) -> Step:
        message = "the checkpoint was unloaded"
        outputs = [TokenOutput(request_id=number, finish_reason="error", error=message) for number in request_ids]
        return Step(model=self.loaded.model, tokens=outputs)

    def _launch(self, batch: Batch) -> LaunchedStep | None:
        """None if there is nothing to launch, or if it raised (out of memory, say)."""
        if not batch.rows:
            return None
        try:
            return self._runner.launch(batch)
        except Exception as error:
            self._recover(batch, error)
            return None

    def _land(self) -> list[TokenOutput]:
        """Takes the results of the step in flight, if there is one. If it failed, a step made after it is lost too."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        self._landed = flight.batch
        try:
            output = self._runner.collect(flight.launched)
        except Exception as error:
            self._recover(flight.batch, error)
            return self._fail(flight.batch)
        # Ahead of results, what the host does costs the device no time.
        took = self._runner.forward_seconds if self._look_ahead else time.monotonic() - self._began
        self._scheduler.record(flight.batch, took, self._runner.draft_seconds)
        return self._forget_ended(self._scheduler.update(flight.batch, output, time.monotonic()))

    def _follow(self, batch: Batch, launched: LaunchedStep | None) -> list[TokenOutput]:
        """Makes the step just made the one in flight, once the step before it has landed."""
        if not batch.rows or not self._scheduler.awaits(batch):
            return []
        if launched is None:
            return self._fail(batch)
        try:
            self._runner.sample(launched)
        except Exception as error:
            self._recover(batch, error)
            return self._fail(batch)
        self._flight = StepInFlight(batch, launched)
        return []

    def _fail(self, batch: Batch) -> list[TokenOutput]:
        reason = "the step failed; see the worker's log"
        if self._out_of_memory:
            reason = "there was no memory for the step, even with this request alone"
        return self._forget_ended(self._scheduler.fail_step(batch, reason, out_of_memory=self._out_of_memory))

    def _recover(self, batch: Batch, error: Exception) -> None:
        """Called where the exception is handled. Raises where the device cannot go on: then the process must end."""
        log.exception("step failed", extra={"model": self.loaded.model, "rows": len(batch.rows)})
        self._out_of_memory = is_out_of_memory(error)
        self._runner.recover()

    def _note_smaller_steps(self) -> None:
        tokens = self._scheduler.max_batch_tokens
        if tokens < self._max_batch_tokens:
            log.warning(
                "too little memory: steps are smaller", extra={"model": self.loaded.model, "max_tokens": tokens}
            )
            self._max_batch_tokens = tokens

    def _take_grammars(self) -> list[TokenOutput]:
        """Lets requests run whose grammar is compiled; those whose grammar is not to be had end."""
        ended = []
        for request_id, error in self._grammars.done():
            if error is None:
                self._scheduler.grammar_ready(request_id)
            elif (output := self._scheduler.grammar_failed(request_id, f"grammar: {error}")) is not None:
                ended.append(output)
        return self._forget_ended(ended)

    def _forget_ended(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """Gives back what it is given."""
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        return outputs

    def _forget(self, request_id: int) -> None:
        self._unstarted.discard(request_id)
        self._grammars.forget(request_id)

    def _newly_started(self) -> list[int]:
        if not self._unstarted:
            return []
        started = self._unstarted & self._scheduler.step_request_ids
        self._unstarted -= started
        return sorted(started)

    def _stats(self, seconds: float) -> LaneStats:
        landed = self._landed
        return LaneStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            kv_cache_usage=self._scheduler.kv_cache_usage,
            step_tokens=landed.num_tokens if landed is not None else 0,
            step_sequences=len(landed.rows) if landed is not None else 0,
            step_seconds=seconds,
            forward_seconds=self._runner.forward_seconds if landed is not None else 0.0,
            num_preempted=self._scheduler.num_preempted,
            num_drafted=sum([row.num_drafted for row in landed.rows]) if landed is not None else 0,
            num_confirmed=self._scheduler.num_confirmed if landed is not None else 0,
        )
