"""How much the worker is given at a time, and whom it is given next.

Per checkpoint a fair queue and a window: the worker holds enough requests to fill its batches and little more, so that
fairness, cancellation and deadlines act here, where they are cheap. Single-pass requests of more than a step have a
queue of their own, of which the worker holds two: it takes turns between them and the smaller ones, which need not wait
for their ends. What it holds beyond its batches counts as waiting like what waits here (a small encoder's, while it is
alone, by its smaller batches). Requests that its cache has no room for wait here, too: it is given new ones only as it
starts those that it has. One that is more urgent, to generate or bulk, is given to it even when it is full, since it
may put others back. After a death the requests that were in the worker come back; one that was being computed in two
deaths without getting anywhere is a suspect. A suspect is let in only among requests that have got somewhere in this
worker, and nobody after it until it has, too: the third death tells who is guilty. Once its turn has come, nobody of
any checkpoint overtakes it. Pure data. Runs in the API process.
"""

from collections.abc import Callable, Iterator

from service.admission import QueueLoad
from service.engine.dispatch_lane import DispatchLane
from service.engine.fair_queue import FairQueue
from service.engine.flight import EncodeFlight, Flight, GenerateFlight
from service.engine.protocol import WorkerConfig
from service.engine.seats import Seats

SUSPECT_DEATHS = 2
SPARE_REQUESTS = 8
"""Requests beyond a full batch, so that a finished one is replaced before the API process hears of it."""
WINDOW_STEPS = 4
"""Steps' worth of tokens that the worker may hold of what it has not started: single-pass work, and prompts."""
SPARE_PROMPTS = 4
"""So many prompts it may hold beside those that it has started, however long they are."""
BULK_REQUESTS = 2
"""Single-pass requests of more than a step inside: one may end without leaving the worker idle."""


class Dispatcher:
    def __init__(self, config: WorkerConfig) -> None:
        self._max_sequences = config.max_sequences
        self._max_batch_tokens = config.max_batch_tokens
        self._window_tokens = config.max_batch_tokens * WINDOW_STEPS
        self._lanes: dict[str, DispatchLane] = {}
        self._suspect: Flight | None = None
        """The one that is inside and has not got anywhere."""
        self._next_suspect: Flight | None = None
        """The one whose turn has come: it waits for those inside to get somewhere, and all others wait for it."""
        self._unproven: set[int] = set()
        """Those inside that have not got anywhere in this worker."""

    def load(self, client: str) -> QueueLoad:
        """What waits, over all checkpoints, and how much of it is `client`'s: here, and in the worker beyond its
        batches."""
        lanes = self._lanes.values()
        shares = [lane.share_of(client) for lane in lanes]
        return QueueLoad(
            num_requests=sum(lane.num_waiting for lane in lanes),
            num_tokens=sum(lane.num_waiting_tokens for lane in lanes),
            client_requests=sum(num_requests for num_requests, _ in shares),
            client_tokens=sum(num_tokens for _, num_tokens in shares),
        )

    def has_seat(self, flight: Flight) -> bool:
        """Whether it would come into the worker's batch without having to wait for any other to leave."""
        if self._suspect is not None or self._next_suspect is not None:
            return False
        lane = self._lanes.get(flight.model.lane_key)
        if lane is None:
            return True
        if len(self._queue_of(lane, flight)) or not self._has_room(lane, flight):
            return False
        if isinstance(flight, EncodeFlight):
            return self._texts_of(lane, flight).fits(_size_of_texts(flight))
        return lane.rows.fits((_num_rows(flight),)) and not self._lacks_room(lane)

    def waiting_in(self, key: str) -> int:
        lane = self._lanes.get(key)
        return lane.num_queued if lane else 0

    def enqueue(self, flight: Flight) -> None:
        lane = self._lanes.get(flight.model.lane_key)
        if lane is None:
            limits = self._max_batch_tokens, flight.model.max_batch_items
            lane = DispatchLane(Seats(self._max_sequences), Seats(*limits), Seats(*limits))
            self._lanes[flight.model.lane_key] = lane
        lane.flights[flight.number] = flight
        queue = self._queue_of(lane, flight)
        queue.push(flight.number, client=flight.client, priority=flight.priority, cost_tokens=flight.cost_tokens)

    def num_of(self, key: str) -> int:
        """The checkpoint's requests, waiting or inside."""
        return len(self.of(key))

    def of(self, key: str) -> list[Flight]:
        flights = (flight for lane in self._lanes.values() for flight in lane.flights.values())
        return [flight for flight in flights if flight.model.key == key]

    def drop(self, key: str) -> None:
        """The checkpoint is served no more, and nothing of it is left."""
        lane = self._lanes.pop(key, None)
        assert lane is None or not lane.flights, "a checkpoint is dropped when its requests have ended"

    def take(self, is_loaded: Callable[[str], bool] = lambda _key: True) -> list[Flight]:
        """What the worker has room for now, in order; it counts as inside from here on."""
        if (suspect := self._next_suspect) is not None and is_loaded(suspect.model.lane_key):
            if self._unproven:
                return []
            self._lanes[suspect.model.lane_key].leave_queue(suspect.number)
            return [self._let_in(suspect)]
        self._next_suspect = None
        return [flight for key in self._lanes if is_loaded(key) for flight in self._take_of(key)]

    def _take_of(self, key: str) -> Iterator[Flight]:
        lane = self._lanes[key]
        for queue in lane.queues:
            while self._suspect is None and self._next_suspect is None and (number := queue.peek()) is not None:
                flight = lane.flights[number]
                if not self._has_room(lane, flight):
                    break
                if _is_suspect(flight) and self._unproven:
                    self._next_suspect = flight
                    return
                queue.pop()
                yield self._let_in(flight)

    def _let_in(self, flight: Flight) -> Flight:
        if _is_suspect(flight):
            self._suspect, self._next_suspect = flight, None
        self._enter(self._lanes[flight.model.lane_key], flight)
        return flight

    def started(self, flight: Flight) -> None:
        """The worker has begun to compute it."""
        lane = self._lanes[flight.model.lane_key]
        assert flight.number in lane.inside, "the worker computes what it was given"
        lane.compiling.discard(flight.number)
        lane.unstarted_tokens -= lane.unstarted.pop(flight.number, 0)
        for seats in lane.seats:
            seats.started(flight.number)

    def passed_over(self, key: str, num_requests: int) -> None:
        """So many of a generating checkpoint's requests had no part in its last step."""
        if (lane := self._lanes.get(key)) is not None:
            lane.num_passed_over = min(num_requests, lane.num_generating)

    def made_progress(self, flight: Flight) -> None:
        assert flight.number in self._lanes[flight.model.lane_key].inside, "the worker computes what it was given"
        flight.deaths_without_progress = 0
        self._unproven.discard(flight.number)
        if self._suspect is flight:
            self._suspect = None

    def forget(self, flight: Flight) -> None:
        """The flight has ended, wherever it was."""
        lane = self._lanes[flight.model.lane_key]
        lane.leave_queue(flight.number)
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
            lane = self._lanes[flight.model.lane_key]
            if batch is None or flight.number in batch or flight.number in lane.compiling:
                flight.deaths_without_progress += 1
            self._leave(lane, flight)
        self._suspect = self._next_suspect = None
        return sorted(lost, key=lambda flight: flight.number)

    def _lacks_room(self, lane: DispatchLane) -> bool:
        """Whether the last step left out others than those whose grammar is being compiled."""
        return lane.num_passed_over > len(lane.compiling)

    def _queue_of(self, lane: DispatchLane, flight: Flight) -> FairQueue:
        return lane.bulk if self._is_bulk(flight) else lane.waiting

    def _texts_of(self, lane: DispatchLane, flight: Flight) -> Seats:
        return lane.bulk_texts if self._is_bulk(flight) else lane.texts

    def _is_bulk(self, flight: Flight) -> bool:
        is_small = flight.cost_tokens <= self._max_batch_tokens or flight.cost_tokens <= flight.model.step_tokens
        return not is_small and isinstance(flight, EncodeFlight)

    def _has_room(self, lane: DispatchLane, flight: Flight) -> bool:
        if isinstance(flight, EncodeFlight):
            if self._is_bulk(flight):
                outranks = all(lane.inside[number].priority < flight.priority for number in lane.bulk_inside)
                return len(lane.bulk_inside) < (2 if outranks else 1) * BULK_REQUESTS
            num_tokens = lane.single_pass_tokens + flight.cost_tokens
            in_window = num_tokens <= self._window_tokens or num_tokens <= 2 * flight.model.step_tokens
            return lane.single_pass_tokens == 0 or in_window
        num_tokens = lane.unstarted_tokens + flight.num_prompt_tokens
        if len(lane.unstarted) >= SPARE_PROMPTS and num_tokens > self._window_tokens:
            return False
        limit = self._max_sequences + SPARE_REQUESTS
        if lane.num_generating < limit:
            return True
        outranks = any(other.priority < flight.priority for other in lane.inside.values())
        return outranks and lane.num_generating < 2 * limit

    def _enter(self, lane: DispatchLane, flight: Flight) -> None:
        lane.inside[flight.number] = flight
        self._unproven.add(flight.number)
        if isinstance(flight, EncodeFlight):
            if self._is_bulk(flight):
                lane.bulk_inside.add(flight.number)
            else:
                lane.single_pass_tokens += flight.cost_tokens
            self._texts_of(lane, flight).enter(flight, _size_of_texts(flight))
            return
        lane.rows.enter(flight, (_num_rows(flight),))
        lane.num_generating += 1
        if isinstance(flight, GenerateFlight) and flight.request.sampling.grammar is None:
            lane.unstarted[flight.number] = flight.num_prompt_tokens
            lane.unstarted_tokens += flight.num_prompt_tokens
        else:
            lane.compiling.add(flight.number)

    def _leave(self, lane: DispatchLane, flight: Flight) -> None:
        self._unproven.discard(flight.number)
        if lane.inside.pop(flight.number, None) is None:
            return
        if isinstance(flight, EncodeFlight):
            if flight.number in lane.bulk_inside:
                lane.bulk_inside.remove(flight.number)
                lane.bulk_texts.leave(flight.number)
            else:
                lane.single_pass_tokens -= flight.cost_tokens
                lane.texts.leave(flight.number)
        else:
            lane.rows.leave(flight.number)
            lane.compiling.discard(flight.number)
            lane.num_generating -= 1
            lane.num_passed_over = min(lane.num_passed_over, lane.num_generating)
            lane.unstarted_tokens -= lane.unstarted.pop(flight.number, 0)


def _is_suspect(flight: Flight) -> bool:
    return flight.deaths_without_progress >= SUSPECT_DEATHS


def _size_of_texts(flight: EncodeFlight) -> tuple[int, int]:
    """Of a batch: tokens and texts."""
    return flight.cost_tokens, len(flight.request.inputs)


def _num_rows(flight: Flight) -> int:
    """Of a batch: a beam search has one for each beam."""
    beam = flight.request.sampling.beam if isinstance(flight, GenerateFlight) else None
    return beam.num_beams if beam is not None else 1
