"""Which texts of single-pass work go through the network together: fair among requests, alike in length.

Items of many requests and tasks of one checkpoint wait here, each priority in a lane of its own; what is left of a
batch's budget goes to the next lane. No clock, thread or I/O, no knowledge of what the items mean. Runs in the worker
process.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from service.engine.deadlines import Deadlines
from service.engine.item_lane import Item, ItemLane
from service.engine.protocol import MAX_BATCH_ITEMS, Encode, EncodeResult

__all__ = ["Batcher", "Item"]


@dataclass(slots=True)
class _Request:
    """A request's items that have not been handed out, by index."""

    lane: ItemLane
    flow: Hashable
    waiting: dict[int, Item] = field(default_factory=dict)


class Batcher:
    """`add`, `cancel`, `expire`, and `next_batch` whenever the network is free: there is no waiting for company."""

    def __init__(
        self, max_batch_tokens: int, max_batch_items: int = MAX_BATCH_ITEMS, *, max_tokens_alone: int | None = None
    ) -> None:
        assert max_batch_tokens > 0
        assert max_batch_items > 0
        self.max_tokens = max_batch_tokens
        self.max_tokens_alone = max_batch_tokens if max_tokens_alone is None else max_tokens_alone
        """Of a batch that nobody else waits for."""
        self._max_items = max_batch_items
        self._requests: dict[int, _Request] = {}
        self._lanes: dict[int, ItemLane] = {}
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
        lane = self._lanes.get(request.priority)
        if lane is None:
            lane = self._lanes[request.priority] = ItemLane(self.max_tokens)
            self._lanes = dict(sorted(self._lanes.items(), reverse=True))
        entry = self._requests[request.request_id] = _Request(lane, flow)
        for index, text in enumerate(request.inputs):
            length = max(1, len(text.ids))
            item = Item(request.request_id, index, text, request.output, length, (start, self._count), request.head)
            self._count += 1
            start += length
            entry.waiting[index] = item
            lane.push(item)
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

    def next_batch(self, *, alone: bool = False) -> list[Item]:
        """Hands out the items to run now, shortest first: within the token budget, or one item that exceeds it."""
        batch: list[Item] = []
        budget = self.max_tokens_alone if alone else self.max_tokens
        for lane in self._lanes.values():
            taken = lane.take(budget, self._max_items - len(batch), may_exceed=not batch)
            if taken and lane.clock > self._clock:
                self._clock = lane.clock
            for item in taken:
                self._leave(item)
            batch += taken
            budget -= sum(item.length for item in taken)
            if not lane.is_empty:
                break
        self._lanes = {priority: lane for priority, lane in self._lanes.items() if not lane.is_empty}
        batch.sort(key=attrgetter("length"))
        return batch

    def _leave(self, item: Item) -> None:
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
            self._requests[request_id].lane.remove(item)
            self._leave(item)
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
