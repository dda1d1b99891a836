"""How much the worker is given at a time, and whom it is given next.

Per checkpoint a fair queue and a window: the worker holds enough requests to fill its batches and little more, so that
fairness, cancellation and deadlines act here, where they are cheap. Requests that its cache has no room for wait here
too: it is given new ones only as it starts those that it has. A more urgent one is given to it even when it is full,
since it may put others back. After a death the requests that were in the worker come back; one that was being computed
in two deaths without getting anywhere is a suspect. A suspect is let in only among
requests that have got somewhere in this worker, and nobody after it until it has, too: the third death tells who is
guilty. Once its turn has come, nobody of any checkpoint overtakes it. Pure data. Runs in the API process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from service.admission import QueueLoad
from service.engine.fair_queue import FairQueue
from service.engine.flight import EncodeFlight, Flight, GenerateFlight
from service.engine.protocol import WorkerConfig

SUSPECT_DEATHS = 2
SPARE_REQUESTS = 8
"""Requests beyond a full batch, so that a finished one is replaced before the API process hears of it."""
WINDOW_STEPS = 4
"""Steps' worth of tokens that the worker may hold of what it has not started: single-pass work, and prompts."""
SPARE_PROMPTS = 4
"""So many prompts it may hold beside those that it has started, however long they are."""


@dataclass(slots=True)
class _Lane:
    waiting: FairQueue = field(default_factory=FairQueue)
    flights: dict[int, Flight] = field(default_factory=dict)
    inside: dict[int, Flight] = field(default_factory=dict)
    single_pass_tokens: int = 0
    num_generating: int = 0
    unstarted: dict[int, int] = field(default_factory=dict)
    """Prompt tokens of the generating requests inside that have not been started there (for want of room, it seems;
    those that wait for their grammar are left out)."""
    unstarted_tokens: int = 0


class Dispatcher:
    def __init__(self, config: WorkerConfig) -> None:
        self._max_sequences = config.max_sequences
        self._window_tokens = config.max_batch_tokens * WINDOW_STEPS
        self._lanes: dict[str, _Lane] = {}
        self._suspect: Flight | None = None
        """The one that is inside and has not got anywhere."""
        self._next_suspect: Flight | None = None
        """The one whose turn has come: it waits for those inside to get somewhere, and all others wait for it."""
        self._unproven: set[int] = set()
        """Those inside that have not got anywhere in this worker."""

    def load(self, client: str) -> QueueLoad:
        """What waits here, over all checkpoints, and how much of it is `client`'s."""
        queues = [lane.waiting for lane in self._lanes.values()]
        shares = [queue.share_of(client) for queue in queues]
        return QueueLoad(
            num_requests=sum(len(queue) for queue in queues),
            num_tokens=sum(queue.num_tokens for queue in queues),
            client_requests=sum(share[0] for share in shares),
            client_tokens=sum(share[1] for share in shares),
        )

    def waiting_in(self, key: str) -> int:
        lane = self._lanes.get(key)
        return len(lane.waiting) if lane else 0

    def enqueue(self, flight: Flight) -> None:
        lane = self._lanes.setdefault(flight.model.key, _Lane())
        lane.flights[flight.number] = flight
        lane.waiting.push(flight.number, client=flight.client, priority=flight.priority, cost_tokens=flight.cost_tokens)

    def num_of(self, key: str) -> int:
        """The checkpoint's requests, waiting or inside."""
        lane = self._lanes.get(key)
        return len(lane.flights) if lane else 0

    def of(self, key: str) -> list[Flight]:
        lane = self._lanes.get(key)
        return list(lane.flights.values()) if lane else []

    def drop(self, key: str) -> None:
        """The checkpoint is served no more, and nothing of it is left."""
        lane = self._lanes.pop(key, None)
        assert lane is None or not lane.flights, "a checkpoint is dropped when its requests have ended"

    def take(self, is_loaded: Callable[[str], bool] = lambda _key: True) -> list[Flight]:
        """What the worker has room for now, in order; it counts as inside from here on."""
        if (suspect := self._next_suspect) is not None and is_loaded(suspect.model.key):
            if self._unproven:
                return []
            self._lanes[suspect.model.key].waiting.remove(suspect.number)
            return [self._let_in(suspect)]
        self._next_suspect = None
        return [flight for key in self._lanes if is_loaded(key) for flight in self._take_of(key)]

    def _take_of(self, key: str) -> Iterator[Flight]:
        lane = self._lanes[key]
        while self._suspect is None and self._next_suspect is None and (number := lane.waiting.peek()) is not None:
            flight = lane.flights[number]
            if not self._has_room(lane, flight):
                return
            if _is_suspect(flight) and self._unproven:
                self._next_suspect = flight
                return
            lane.waiting.pop()
            yield self._let_in(flight)

    def _let_in(self, flight: Flight) -> Flight:
        if _is_suspect(flight):
            self._suspect, self._next_suspect = flight, None
        self._enter(self._lanes[flight.model.key], flight)
        return flight

    def started(self, flight: Flight) -> None:
        """The worker has begun to compute it."""
        lane = self._lanes[flight.model.key]
        lane.unstarted_tokens -= lane.unstarted.pop(flight.number, 0)

    def made_progress(self, flight: Flight) -> None:
        flight.deaths_without_progress = 0
        self._unproven.discard(flight.number)
        if self._suspect is flight:
            self._suspect = None

    def forget(self, flight: Flight) -> None:
        """The flight has ended, wherever it was."""
        lane = self._lanes[flight.model.key]
        lane.waiting.remove(flight.number)
        lane.flights.pop(flight.number, None)
        self._leave(lane, flight)
        if self._suspect is flight:
            self._suspect = None
        if self._next_suspect is flight:
            self._next_suspect = None

    def take_back(self, batch: frozenset[int] | None = None) -> list[Flight]:
        """Everything that was inside the worker, which has died: one death more for each that may be the cause, those
        of its step (of `batch`; all, where that is not known) and those whose grammar was being compiled beside it."""
        lost = [flight for lane in self._lanes.values() for flight in lane.inside.values()]
        for flight in lost:
            if batch is None or flight.number in batch or self._compiles(flight):
                flight.deaths_without_progress += 1
            self._leave(self._lanes[flight.model.key], flight)
        self._suspect = self._next_suspect = None
        return sorted(lost, key=lambda flight: flight.number)

    def _compiles(self, flight: Flight) -> bool:
        has_grammar = isinstance(flight, GenerateFlight) and flight.request.sampling.grammar is not None
        return has_grammar and flight.number in self._unproven

    def _has_room(self, lane: _Lane, flight: Flight) -> bool:
        if isinstance(flight, EncodeFlight):
            return lane.single_pass_tokens == 0 or lane.single_pass_tokens + flight.cost_tokens <= self._window_tokens
        num_tokens = lane.unstarted_tokens + flight.num_prompt_tokens
        if len(lane.unstarted) >= SPARE_PROMPTS and num_tokens > self._window_tokens:
            return False
        limit = self._max_sequences + SPARE_REQUESTS
        if lane.num_generating < limit:
            return True
        outranks = any(other.priority < flight.priority for other in lane.inside.values())
        return outranks and lane.num_generating < 2 * limit

    def _enter(self, lane: _Lane, flight: Flight) -> None:
        lane.inside[flight.number] = flight
        self._unproven.add(flight.number)
        if isinstance(flight, EncodeFlight):
            lane.single_pass_tokens += flight.cost_tokens
            return
        lane.num_generating += 1
        if isinstance(flight, GenerateFlight) and flight.request.sampling.grammar is None:
            lane.unstarted[flight.number] = flight.num_prompt_tokens
            lane.unstarted_tokens += flight.num_prompt_tokens

    def _leave(self, lane: _Lane, flight: Flight) -> None:
        self._unproven.discard(flight.number)
        if lane.inside.pop(flight.number, None) is None:
            return
        if isinstance(flight, EncodeFlight):
            lane.single_pass_tokens -= flight.cost_tokens
        else:
            lane.num_generating -= 1
            lane.unstarted_tokens -= lane.unstarted.pop(flight.number, 0)


def _is_suspect(flight: Flight) -> bool:
    return flight.deaths_without_progress >= SUSPECT_DEATHS
