"""The progress clock tells a stuck worker from one that works or rests."""

import os
from collections.abc import Iterator

import pytest

from service.engine.progress import ProgressClock, StepBound


@pytest.fixture
def clock() -> Iterator[ProgressClock]:
    made = ProgressClock.create()
    yield made
    made.close()


def test_a_step_is_overdue_past_its_bound_and_not_before(clock: ProgressClock) -> None:
    clock.begin_step(100.0, 5.0)
    assert clock.overdue_seconds(104.9, 1.0) < 0
    assert clock.overdue_seconds(105.5, 1.0) == pytest.approx(0.5)


def test_a_worker_that_stops_beating_between_steps_is_overdue(clock: ProgressClock) -> None:
    clock.begin_step(100.0, 5.0)
    clock.beat(101.0)
    assert clock.overdue_seconds(102.5, 2.0) < 0
    assert clock.overdue_seconds(103.5, 2.0) == pytest.approx(0.5)


def test_both_processes_see_one_page(clock: ProgressClock) -> None:
    other = ProgressClock(os.dup(clock.descriptor))
    other.begin_step(50.0, 1.0)
    assert clock.overdue_seconds(53.0, 1.0) == pytest.approx(2.0)
    other.close()


def test_a_long_prefill_is_given_the_time_that_its_tokens_take() -> None:
    bound = StepBound(floor_seconds=1.0)
    for _ in range(StepBound.WARM_UP_STEPS):
        assert bound.seconds(10) == pytest.approx(StepBound.WARM_UP_FACTOR)
        bound.record(10, 0.1)
    assert bound.seconds(10) == pytest.approx(2.0)
    assert bound.seconds(10_000) == pytest.approx(2000.0)
    assert bound.seconds(1) == pytest.approx(1.0)


def test_one_slow_step_raises_the_bound_at_once_and_it_comes_down_slowly() -> None:
    bound = StepBound(floor_seconds=0.001)
    for _ in range(10):
        bound.record(10, 0.1)
    bound.record(10, 1.0)
    after_slow = bound.seconds(10)
    assert after_slow == pytest.approx(20.0)
    bound.record(10, 0.1)
    assert 2.0 < bound.seconds(10) < after_slow
