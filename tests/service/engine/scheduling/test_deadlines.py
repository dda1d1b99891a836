"""The heap of deadlines: who is due, and nothing kept of who has ended."""

from service.engine.deadlines import Deadlines


def test_due_requests_come_earliest_first_and_once() -> None:
    deadlines = Deadlines()
    for number, deadline in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 9.0)):
        deadlines.add(number, deadline)
    deadlines.discard(3)
    assert deadlines.first == 1.0
    assert deadlines.take_due(0.9) == []
    assert deadlines.take_due(3.0) == [2, 1]
    assert deadlines.take_due(3.0) == []
    assert deadlines.first == 9.0


def test_requests_that_ended_are_not_kept_until_their_deadline() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.add(number, 600.0)
        deadlines.discard(number)
    assert len(deadlines._heap) < 100
