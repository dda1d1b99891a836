"""Which texts of single-pass work go through the network together: fair among requests, alike in length.

Items of many requests and tasks of one checkpoint wait here. A batch holds the item whose turn it is and, of those not
far behind it, the ones nearest in length. Turns go by start-time fair queueing (Goyal, Vin, Cheng 1996): a request with
one item waits for a bounded amount of others' work, whatever lies queued. No clock, thread or I/O, no knowledge of what
the items mean. Runs in the worker process.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter
from typing import Literal

from service.engine.deadlines import Deadlines
from service.engine.protocol import Encode, EncodeInput, EncodeOutput, EncodeResult

MAX_PADDING = 0.1
"""Share of a batch's tokens that padding it to a rectangle may add, once the batch is worth its step."""
LOOK_AHEAD = 8
"""Budgets' worth of items among which alike ones are sought."""
MAX_WINDOW_ITEMS = 4096


@dataclass(slots=True)
class _Request:
    """A request's items that have not been handed out, by index."""

    waiting: "dict[int, Item]" = field(default_factory=dict)
    flow: Hashable = None


@dataclass(slots=True, eq=False)
class Item:
    """One text or pair of a request, to be run in one pass."""

    request_id: int
    index: int
    input: EncodeInput
    output: EncodeOutput
    length: int
    turn: tuple[float, int]
    """Virtual start time and a running number: who is next."""
    head: str = ""
    gone: bool = False
    """Handed out, cancelled or expired."""


class Batcher:
    """`add`, `cancel`, `expire`, and `next_batch` whenever the network is free: there is no waiting for company."""

    def __init__(self, max_batch_tokens: int, max_batch_items: int = 1024) -> None:
        assert max_batch_tokens > 0
        assert max_batch_items > 0
        self._max_tokens = max_batch_tokens
        self._max_items = max_batch_items
        self._requests: dict[int, _Request] = {}
        self._lanes: dict[int, _Lane] = {}
        self._flows: dict[Hashable, tuple[float, int]] = {}
        """For each flow with items here: virtual finish time of its last item, number of its requests."""
        self._deadlines = Deadlines()
        self._clock = 0.0
        """Virtual time: the start of the last item whose turn came."""
        self._count = 0
        self.num_waiting = 0
        self.num_waiting_tokens = 0

    def add(self, request: Encode, *, flow: Hashable = None) -> None:
        """Queues all items; requests of one `flow` (a client) share one turn, by default each has its own."""
        assert request.request_id not in self._requests, f"request {request.request_id} is here already"
        if not request.inputs:
            return
        flow = ("request", request.request_id) if flow is None else flow
        finish, num_requests = self._flows.get(flow, (0.0, 0))
        start = max(self._clock, finish)
        entry = self._requests[request.request_id] = _Request(flow=flow)
        lane = self._lanes.get(request.priority)
        if lane is None:
            lane = self._lanes[request.priority] = _Lane()
            self._lanes = dict(sorted(self._lanes.items(), reverse=True))
        for index, text in enumerate(request.inputs):
            length = max(1, len(text.ids))
            item = Item(request.request_id, index, text, request.output, length, (start, self._count), request.head)
            self._count += 1
            start += length
            entry.waiting[index] = item
            heappush(lane.queue, (item.turn, item))
            self.num_waiting_tokens += length
        self.num_waiting += len(request.inputs)
        self._flows[flow] = (start, num_requests + 1)
        if request.deadline is not None:
            self._deadlines.add(request.request_id, request.deadline)

    @property
    def request_ids(self) -> list[int]:
        """Requests with items that have not been handed out."""
        return list(self._requests)

    def cancel(self, request_id: int) -> list[EncodeResult]:
        """Drops a request's waiting items; their ends, none if it is not here."""
        return self._drop(request_id, "cancelled")

    def expire(self, now: float) -> list[EncodeResult]:
        """Drops the waiting items of requests whose deadline has passed."""
        due = self._deadlines.take_due(now)
        return [result for number in due for result in self._drop(number, "deadline")]

    def next_batch(self) -> list[Item]:
        """Hands out the items to run now, shortest first: within the token budget, or one item that exceeds it."""
        batch: list[Item] = []
        budget = self._max_tokens
        for lane in self._lanes.values():
            taken = lane.take(budget, self._max_items - len(batch), self._max_tokens, alone=not batch)
            if taken and lane.clock > self._clock:
                self._clock = lane.clock
            for item in taken:
                self._leave(item)
            batch += taken
            budget -= sum(item.length for item in taken)
            if lane.head() is not None:
                break
        self._lanes = {priority: lane for priority, lane in self._lanes.items() if lane.head() is not None}
        batch.sort(key=attrgetter("length"))
        return batch

    def _leave(self, item: Item) -> None:
        item.gone = True
        self.num_waiting -= 1
        self.num_waiting_tokens -= item.length
        request = self._requests[item.request_id]
        del request.waiting[item.index]
        if not request.waiting:
            self._close(item.request_id)

    def _drop(self, request_id: int, reason: Literal["cancelled", "deadline"]) -> list[EncodeResult]:
        request = self._requests.get(request_id)
        items = list(request.waiting.values()) if request is not None else []
        for item in items:
            self._leave(item)
        for lane in self._lanes.values():
            lane.has_gaps = True
        return [EncodeResult(request_id=request_id, index=item.index, reason=reason) for item in items]

    def _close(self, request_id: int) -> None:
        flow = self._requests.pop(request_id).flow
        self._deadlines.discard(request_id)
        finish, num_requests = self._flows[flow]
        # A flow's debt ends with its last waiting item, or flows would pile up.
        if num_requests == 1:
            del self._flows[flow]
        else:
            self._flows[flow] = (finish, num_requests - 1)


class _Lane:
    """The items of one priority: a queue by turn, and of its first ones a window sorted by length."""

    def __init__(self) -> None:
        self.queue: list[tuple[tuple[float, int], Item]] = []
        self.clock = 0.0
        self.has_gaps = False
        """Whether items of the window have left otherwise than by being taken."""
        self._window: list[Item] = []
        self._window_turns: list[tuple[tuple[float, int], Item]] = []
        self._window_tokens = 0

    def head(self) -> Item | None:
        """Whose turn it is."""
        heads = [heap[0] for heap in (self.queue, self._window_turns) if _drop_gone(heap)]
        return min(heads)[1] if heads else None

    def take(self, budget: int, max_items: int, max_tokens: int, *, alone: bool) -> list[Item]:
        """The head and its neighbours in length; nothing if the head does not fit, unless it may run alone."""
        head = self.head()
        if head is None or max_items == 0 or (head.length > budget and not alone):
            return []
        self._fill_window(head, LOOK_AHEAD * max_tokens)
        first, last = 0, len(self._window) - 1
        if self._window_tokens > budget or len(self._window) > max_items:
            first, last = self._neighbours(head, budget, max_items)
        taken = self._window[first : last + 1]
        del self._window[first : last + 1]
        self._window_tokens -= sum([item.length for item in taken])
        self.clock = head.turn[0]
        return taken

    def _fill_window(self, head: Item, max_tokens: int) -> None:
        """Moves items up from the queue in the order of their turns."""
        if self.has_gaps:
            self._window = [item for item in self._window if not item.gone]
            self._window_tokens = sum(item.length for item in self._window)
            self.has_gaps = False
        while self.queue:
            turn, item = self.queue[0]
            full = self._window_tokens >= max_tokens or len(self._window) >= MAX_WINDOW_ITEMS
            # The most urgent one gets in even where the window is full.
            if full and turn > head.turn:
                break
            heappop(self.queue)
            if not item.gone:
                self._window.append(item)
                heappush(self._window_turns, (turn, item))
                self._window_tokens += item.length
        self._window.sort(key=attrgetter("length"))

    def _neighbours(self, head: Item, budget: int, max_items: int) -> tuple[int, int]:
        """The range of the window, first and last included, that makes the batch."""
        window = self._window
        first = last = window.index(head)
        total = head.length
        worthwhile = budget // 4
        while last - first + 1 < max_items:
            down = head.length - window[first - 1].length if first > 0 else None
            up = window[last + 1].length - head.length if last + 1 < len(window) else None
            go_up = up is not None and (down is None or up <= down)
            if go_up and total + window[last + 1].length > budget:
                go_up = False
            if not go_up and down is None:
                break
            added = window[last + 1 if go_up else first - 1].length
            longest = added if go_up else window[last].length
            total += added
            padded = longest * (last - first + 2)
            if total > budget or (total > worthwhile and padded > (1 + MAX_PADDING) * total):
                break
            first, last = (first, last + 1) if go_up else (first - 1, last)
        return first, last


def _drop_gone(heap: list[tuple[tuple[float, int], Item]]) -> bool:
    """Takes what has left off the top of a heap; whether anything remains."""
    while heap and heap[0][1].gone:
        heappop(heap)
    return bool(heap)
