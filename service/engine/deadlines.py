"""When requests run out of time: who is due, in O(log n), without keeping anything of requests that have ended.

Knows numbers and times, nothing of requests. Runs in the worker process.
"""

from heapq import heapify, heappop, heappush


class Deadlines:
    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._deadlines: dict[int, float] = {}

    def add(self, request_id: int, deadline: float) -> None:
        self._deadlines[request_id] = deadline
        heappush(self._heap, (deadline, request_id))

    def discard(self, request_id: int) -> None:
        """Forgets a request that has ended, if it had a deadline."""
        self._deadlines.pop(request_id, None)
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [(deadline, number) for number, deadline in self._deadlines.items()]
            heapify(self._heap)

    @property
    def first(self) -> float | None:
        """The next deadline; None without any."""
        while self._heap and self._deadlines.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: float) -> list[int]:
        """The requests whose deadline has come, earliest first; they are forgotten."""
        due = []
        while (first := self.first) is not None and first <= now:
            number = heappop(self._heap)[1]
            del self._deadlines[number]
            due.append(number)
        return due
