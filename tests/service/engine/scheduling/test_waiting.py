"""The waiting queue: most urgent first, and nothing kept of who has left."""

from typing import Any

from service.engine.sequence import Phase
from service.engine.waiting import WaitingQueue


def test_the_most_urgent_comes_first_and_who_left_is_skipped(make_request: Any) -> None:
    queue = WaitingQueue()
    sequences = [make_request([1], priority=priority).sequence() for priority in (0, 1, 0, 1)]
    for sequence in sequences:
        queue.push(sequence)
    sequences[1].phase = Phase.finished
    assert [queue.pop().request_id for _ in range(3)] == [3, 0, 2]
    assert queue.head() is None


def test_who_left_does_not_pile_up_behind_a_head_that_waits(make_request: Any) -> None:
    queue = WaitingQueue()
    queue.push(make_request([1], priority=1).sequence())
    for _ in range(10_000):
        sequence = make_request([1]).sequence()
        queue.push(sequence)
        sequence.phase = Phase.finished
    assert len(queue._heap) < 200
    assert queue.head() is not None
