"""The single-pass items of one priority that wait: whose turn it is, and who goes with them.

Turns go by start-time fair queueing (Goyal, Vin, Cheng 1996), so that a request with one item need not wait for all
that lies queued. Whoever has waited while twice what lay before it, with a window on top, was served goes first, so
that arrivals without end starve nobody. A batch holds neighbours in length, sought among the first in line. Knows
nothing of requests beyond their items. Runs in the worker process.
"""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter

from service.engine.protocol import EncodeInput, EncodeOutput

MAX_PADDING = 0.1
"""Share of a batch's tokens that padding it to a rectangle may add, once the batch is worth its step."""
LOOK_AHEAD = 8
"""Budgets' worth of items among which alike ones are sought."""
MAX_WINDOW_ITEMS = 4096


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
    latest: int = 0
    """Tokens that its lane has served when its patience ends."""
    gone: bool = False
    """Handed out, cancelled or expired."""


class ItemLane:
    """A queue by turn, of its first items a window sorted by length, and everybody in the order of arrival."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.clock = 0.0
        """Virtual time: the start of the last item whose turn came."""
        self._max_window_tokens = LOOK_AHEAD * max_batch_tokens
        self._queue: list[tuple[tuple[float, int], Item]] = []
        self._arrivals: deque[Item] = deque()
        self._num_waiting_tokens = 0
        self._num_served_tokens = 0
        self._has_gaps = False
        """Whether items of the window have left otherwise than by being taken from it."""
        self._window: list[Item] = []
        self._window_turns: list[tuple[tuple[float, int], Item]] = []
        self._window_tokens = 0

    def push(self, item: Item) -> None:
        """Queues an item; it need not wait until twice what now lies before it, with a window on top of it, has been
        served."""
        item.latest = self._num_served_tokens + 2 * (self._num_waiting_tokens + self._max_window_tokens)
        if self._arrivals:
            item.latest = max(item.latest, self._arrivals[-1].latest)
        self._num_waiting_tokens += item.length
        self._arrivals.append(item)
        heappush(self._queue, (item.turn, item))

    def remove(self, item: Item) -> None:
        """Lets go of an item that is cancelled or has expired."""
        item.gone = True
        self._num_waiting_tokens -= item.length
        self._has_gaps = True

    @property
    def is_empty(self) -> bool:
        return self._num_waiting_tokens == 0

    def take(self, budget: int, max_items: int, *, may_exceed: bool) -> list[Item]:
        """The item whose turn it is and its neighbours in length; nothing if that one does not fit, unless it may
        exceed the budget."""
        if self.is_empty or max_items == 0:
            return []
        oldest = self._oldest()
        late = oldest.latest <= self._num_served_tokens
        head = oldest if late else self._head()
        if head.length > budget and not may_exceed:
            return []
        candidates = self._eldest() if late else self._filled_window(head)
        first, last = _neighbours(candidates, head, budget, max_items)
        taken = candidates[first : last + 1]
        if late:
            self._has_gaps = True
        else:
            del self._window[first : last + 1]
            self._window_tokens -= sum([item.length for item in taken])
            self.clock = head.turn[0]
        for item in taken:
            item.gone = True
            self._num_waiting_tokens -= item.length
            self._num_served_tokens += item.length
        return taken

    def _head(self) -> Item:
        """Whose turn it is."""
        return min(heap[0] for heap in (self._queue, self._window_turns) if _drop_gone(heap))[1]

    def _oldest(self) -> Item:
        while self._arrivals[0].gone:
            self._arrivals.popleft()
        return self._arrivals[0]

    def _eldest(self) -> list[Item]:
        """Those who have waited for longest, a window's worth, sorted by length."""
        found: list[Item] = []
        num_tokens = 0
        for item in self._arrivals:
            if num_tokens >= self._max_window_tokens or len(found) == MAX_WINDOW_ITEMS:
                break
            if not item.gone:
                found.append(item)
                num_tokens += item.length
        found.sort(key=attrgetter("length"))
        return found

    def _filled_window(self, head: Item) -> list[Item]:
        """The window, after items have moved up from the queue in the order of their turns."""
        if self._has_gaps:
            self._window = [item for item in self._window if not item.gone]
            self._window_tokens = sum([item.length for item in self._window])
            self._has_gaps = False
        while self._queue:
            turn, item = self._queue[0]
            full = self._window_tokens >= self._max_window_tokens or len(self._window) >= MAX_WINDOW_ITEMS
            # The most urgent one gets in even where the window is full.
            if full and turn > head.turn:
                break
            heappop(self._queue)
            if not item.gone:
                self._window.append(item)
                heappush(self._window_turns, (turn, item))
                self._window_tokens += item.length
        self._window.sort(key=attrgetter("length"))
        return self._window


def _neighbours(items: list[Item], head: Item, budget: int, max_items: int) -> tuple[int, int]:
    """The range of items sorted by length, first and last included, that makes the batch around `head`."""
    if len(items) <= max_items and sum([item.length for item in items]) <= budget:
        return 0, len(items) - 1
    first = last = items.index(head)
    total = head.length
    worthwhile = budget // 4
    while last - first + 1 < max_items:
        down = head.length - items[first - 1].length if first > 0 else None
        up = items[last + 1].length - head.length if last + 1 < len(items) else None
        go_up = up is not None and (down is None or up <= down) and total + items[last + 1].length <= budget
        if not go_up and down is None:
            break
        added = items[last + 1 if go_up else first - 1].length
        longest = added if go_up else items[last].length
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
