"""The queue of requests that hold no blocks, most urgent first.

Knows nothing of why a request waits. A request that left by another door (cancelled, expired) is skipped when it
comes up, so leaving costs nothing. Runs in the worker process.
"""

from heapq import heapify, heappop, heappush

from service.engine.sequence import Phase, Sequence


class WaitingQueue:
    """A heap by urgency; a sequence is in at most one queue, and in it at most once."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], Sequence]] = []
        self._max_unchecked = 64

    def __len__(self) -> int:
        """No fewer than wait: some of these may have left."""
        return len(self._heap)

    def push(self, sequence: Sequence) -> None:
        if len(self._heap) >= self._max_unchecked:
            # What has left must not pile up behind a head that waits for long.
            self._heap = [entry for entry in self._heap if entry[1].phase is Phase.waiting]
            heapify(self._heap)
            self._max_unchecked = 2 * len(self._heap) + 64
        heappush(self._heap, (sequence.urgency, sequence))

    def head(self) -> Sequence | None:
        """The most urgent sequence that still waits."""
        heap = self._heap
        while heap and heap[0][1].phase is not Phase.waiting:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Sequence:
        sequence = self.head()
        assert sequence is not None
        heappop(self._heap)
        return sequence
