"""The accepted requests that have not ended: each is here until it ends, exactly once, whatever happens meanwhile.

They wait in fair queues, are handed to the worker as it has room, and get what its steps give them; what a dead worker
had goes back to the queue, to be run again from where it was. Knows tokens, not text, and not why a worker dies. Runs
in the API process, on its event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from service.engine.accounting import Accounting
from service.engine.dispatch import Dispatcher
from service.engine.flight import EncodeFlight, Flight, GenerateFlight
from service.engine.models import LoadedModel
from service.engine.protocol import Blame, Cancel, EncodeResult, Step, TokenOutput, ToWorker
from service.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    GenerationFailed,
    InvalidGrammar,
    InvalidRequest,
    PayloadTooLarge,
    Quarantined,
    ServiceError,
)

log = logging.getLogger("slimpajama.engine")

GUILTY_DEATHS = 3
FAILURES: Mapping[Blame | None, type[ServiceError]] = {
    None: GenerationFailed, "context": ContextLengthExceeded, "request": InvalidRequest, "grammar": InvalidGrammar,
}  # fmt: skip


class Ledger:
    def __init__(
        self,
        dispatcher: Dispatcher,
        accounting: Accounting,
        *,
        send: Callable[[ToWorker], None],
        is_loaded: Callable[[str], bool],
    ) -> None:
        """`send` drops what it is given while there is no worker; `is_loaded` says whether it holds a checkpoint."""
        self._dispatcher = dispatcher
        self._books = accounting
        self._send = send
        self._is_loaded = is_loaded
        self._flights: dict[int, Flight] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._flights)

    async def until_empty(self) -> None:
        await self._empty.wait()

    # -- in -----------------------------------------------------------------------------------------------------------

    def admit(self, flight: Flight) -> None:
        """Takes a request in if it need not wait, or the queue has room for it. Raises DeadlineExceeded, Overloaded."""
        now = flight.accepted
        if flight.deadline is not None and flight.deadline <= now:
            self._books.metrics.rejected("deadline")
            raise DeadlineExceeded("the deadline had passed when the request arrived", param="timeout")
        if not (self._is_loaded(flight.model.lane_key) and self._dispatcher.has_seat(flight)):
            load = self._dispatcher.load(flight.client)
            self._books.admit(load, num_tokens=flight.cost_tokens, client=flight.client, now=now)
        self.enter(flight)

    def enter(self, flight: Flight) -> None:
        """Takes a request in, whatever waits."""
        self._books.accepted(flight)
        self._flights[flight.number] = flight
        self._empty.clear()
        if flight.deadline is not None:
            seconds = flight.deadline - flight.accepted
            flight.deadline_timer = asyncio.get_running_loop().call_later(seconds, self._expire, flight)
        self._dispatcher.enqueue(flight)
        self.pump()

    def pump(self) -> None:
        """Hands the worker what it has room for, of the checkpoints that it holds."""
        for flight in self._dispatcher.take(self._is_loaded):
            flight.dispatched = True
            self._send(flight.message())

    # -- out ----------------------------------------------------------------------------------------------------------

    def end(self, flight: Flight, outcome: str, error: ServiceError | None = None) -> None:
        """Ends a flight from this side (cancelled, deadline, stop string); nothing happens if it has ended."""
        if flight.outcome is None:
            self._abandon(flight, outcome, error)
            self.pump()

    def fail_all(self, error: ServiceError) -> None:
        for flight in list(self._flights.values()):
            if flight.outcome is None:  # else the end of another has ended it: a shadow ends with its original
                self._abandon(flight, "error", error)

    def fail_of(self, key: str, error: ServiceError) -> None:
        """Fails the requests of one checkpoint."""
        for flight in self._dispatcher.of(key):
            self.end(flight, "error", error)

    def _abandon(self, flight: Flight, outcome: str, error: ServiceError | None) -> None:
        if flight.dispatched:
            self._send(Cancel(flight.number))
        flight.stopped_here = outcome == "stop"
        self._finish(flight, outcome, error)

    def _expire(self, flight: Flight) -> None:
        self.end(flight, "deadline", DeadlineExceeded("the request's deadline passed before it was finished"))

    def _finish(self, flight: Flight, outcome: str, error: ServiceError | None = None) -> None:
        del self._flights[flight.number]
        self._dispatcher.forget(flight)
        now = time.monotonic()
        flight.end(outcome, error)
        self._books.finished(flight, outcome, now)
        if not self._flights:
            self._empty.set()

    # -- what the worker gives ----------------------------------------------------------------------------------------

    def take_step(self, step: Step, model: LoadedModel | None) -> None:
        """Files a step's results with their requests; what has ended meanwhile gets nothing."""
        now = time.monotonic()
        for number in step.started_ids:
            flight = self._flights.get(number)
            if flight is None:
                continue
            self._dispatcher.started(flight)
            if flight.started is None:
                self._books.started(flight, now - step.stats.step_seconds)
        for output in step.tokens:
            flight = self._flights.get(output.request_id)
            if isinstance(flight, GenerateFlight):
                self._take_tokens(flight, output, now)
        for result in step.encoded:
            flight = self._flights.get(result.request_id)
            if isinstance(flight, EncodeFlight):
                self._take_encoded(flight, result)
        self._dispatcher.passed_over(step.model, step.stats.num_waiting)
        self.pump()
        if model is not None:
            self._books.step(model, step, self._dispatcher.waiting_in(step.model))

    def _take_tokens(self, flight: GenerateFlight, output: TokenOutput, now: float) -> None:
        if output.error is not None:
            log.warning("request failed in the worker", extra=flight.described() | {"reason": output.error})
            if flight.first_output is not None:
                output.blame = None  # it has run: that this worker cannot go on with it is not its fault
            self._finish(flight, "error", failure_of(output))
            return
        if output.token_ids:
            self._dispatcher.made_progress(flight)
            self._books.tokens(flight, len(output.token_ids), now)
        flight.num_cached_tokens = max(flight.num_cached_tokens, output.num_cached_tokens)
        reason, is_late = output.finish_reason, output.finish_reason == "deadline"
        if is_late:
            output.finish_reason = None  # the tokens are read first, and then the error
        flight.deliver(output)
        if is_late:
            self._finish(flight, "deadline", _too_late())
        elif reason is not None:
            self._finish(flight, reason)

    def _take_encoded(self, flight: EncodeFlight, result: EncodeResult) -> None:
        self._dispatcher.made_progress(flight)
        if result.reason == "deadline":
            self._finish(flight, "deadline", _too_late())
            return
        result.started = flight.started
        is_last = flight.deliver(result)
        if flight.has_too_many_numbers:
            self._abandon(flight, "error", too_many_numbers(flight))
        elif is_last:
            self._finish(flight, "stop")

    # -- a worker's death ---------------------------------------------------------------------------------------------

    def take_back(self, batch: frozenset[int] | None = None) -> None:
        """Puts back to the queue what the worker had; convicts a request that keeps dying where nothing else does.
        `batch`: what the worker was computing, where that is known."""
        for flight in self._dispatcher.take_back(batch):
            flight.dispatched = False
            if flight.outcome is not None:  # the conviction of another has ended it: a shadow ends with its original
                continue
            if flight.deaths_without_progress >= GUILTY_DEATHS:
                log.error("request quarantined", extra=flight.described())
                error = Quarantined("the worker died each time it ran this request; it will not be tried again")
                self._finish(flight, "error", error)
                continue
            self._books.replayed(flight)
            self._dispatcher.enqueue(flight)


def failure_of(output: TokenOutput) -> ServiceError:
    """The error of a request that the worker has refused, or failed at."""
    assert output.error is not None
    return FAILURES[output.blame](output.error)


def too_many_numbers(flight: EncodeFlight) -> PayloadTooLarge:
    return PayloadTooLarge(f"the results have more than {flight.request.max_numbers:,} numbers together")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the request was finished")
