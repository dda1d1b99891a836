"""A generating checkpoint in the worker: scheduler over runner, grammars compiled beside it, faults contained.

Knows messages, sequences and steps; not weights (the runner's) and not blocks (the scheduler's). Worker process, main
thread; only grammar compilation happens elsewhere, and reports back through `GrammarCompiler.done`.
"""

import logging
import time

from model.batch import Batch, StepOutput
from model.grammar import GrammarCompiler
from model.runner import Runner
from service.engine.protocol import GRAMMAR_ERROR, Encode, Generate, LaneStats, Loaded, Step, TokenOutput
from service.engine.scheduler import Scheduler
from service.engine.sequence import sequence_from

log = logging.getLogger("slimpajama.worker")


class GenerationLane:
    """Implements `Lane`."""

    def __init__(self, loaded: Loaded, scheduler: Scheduler, runner: Runner, grammars: GrammarCompiler) -> None:
        self.loaded = loaded
        self.busy_seconds = 0.0
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = grammars
        self._unstarted: set[int] = set()
        self._outbox: list[TokenOutput] = []

    @property
    def has_work(self) -> bool:
        return bool(self._outbox) or self._scheduler.has_work or self._grammars.any_done

    @property
    def next_step_tokens(self) -> int:
        return self._scheduler.num_running + self._scheduler.num_waiting_tokens

    def submit(self, message: Generate | Encode, now: float) -> None:
        if isinstance(message, Encode):
            raise ValueError(f"checkpoint '{message.model}' generates; it has no single-pass output")
        refused = self._scheduler.add(sequence_from(message), now)
        if refused is not None:
            self._outbox.append(refused)
            return
        self._unstarted.add(message.request_id)
        if message.sampling.grammar is not None:
            self._grammars.start(message.request_id, message.sampling.grammar, message.output_ids)

    def cancel(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)
        self._forget(request_id)

    def step(self, now: float) -> Step:
        delivered, self._outbox = self._outbox, []
        delivered += self._scheduler.expire(now)
        delivered += self._take_grammars()
        batch = self._scheduler.schedule(now)
        output = self._run(batch) if batch.rows else StepOutput(rows=[])
        if output is None:
            delivered += self._scheduler.fail_step(batch, "the step failed; see the worker's log")
        elif batch.rows:
            delivered += self._scheduler.update(batch, output, time.monotonic())
        for entry in delivered:
            if entry.finish_reason is not None:
                self._forget(entry.request_id)
        seconds = time.monotonic() - now
        self.busy_seconds += seconds
        return Step(
            model=self.loaded.model,
            started_ids=self._newly_started(),
            tokens=delivered,
            stats=self._stats(batch, seconds),
        )

    def close(self) -> Step:
        message = "the checkpoint was unloaded"
        outputs = [
            TokenOutput(request_id=number, finish_reason="error", error=message)
            for number in self._scheduler.request_ids
        ]
        return Step(model=self.loaded.model, tokens=outputs)

    def _run(self, batch: Batch) -> StepOutput | None:
        """The step's results; None if it raised as a whole (out of memory, a device error that leaves the device)."""
        try:
            return self._runner.run(batch)
        except Exception:
            log.exception("step failed", extra={"model": self.loaded.model, "rows": len(batch.rows)})
            self._runner.recover()
            return None

    def _take_grammars(self) -> list[TokenOutput]:
        """Lets requests run whose grammar is compiled; those whose grammar is not to be had end."""
        ended = []
        for request_id, error in self._grammars.done():
            if error is None:
                self._scheduler.grammar_ready(request_id)
            elif (output := self._scheduler.grammar_failed(request_id, f"{GRAMMAR_ERROR}{error}")) is not None:
                ended.append(output)
        return ended

    def _forget(self, request_id: int) -> None:
        self._unstarted.discard(request_id)
        self._grammars.forget(request_id)

    def _newly_started(self) -> list[int]:
        if not self._unstarted:
            return []
        started = self._unstarted & self._scheduler.step_request_ids
        self._unstarted -= started
        return sorted(started)

    def _stats(self, batch: Batch, seconds: float) -> LaneStats:
        return LaneStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_waiting_tokens=self._scheduler.num_waiting_tokens,
            kv_cache_usage=self._scheduler.kv_cache_usage,
            step_tokens=batch.num_tokens,
            step_sequences=len(batch.rows),
            step_seconds=seconds,
            forward_seconds=self._runner.forward_seconds if batch.rows else 0.0,
            num_preempted=self._scheduler.num_preempted,
        )
