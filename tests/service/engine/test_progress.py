"""The progress clock tells a stuck worker from one that works or rests."""

import os
from collections.abc import Iterator

import pytest

from service.engine.progress import MAX_NOTED, Judge, ProgressClock, StepBound


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


def test_whose_requests_are_in_a_step_is_known_from_their_noting_to_the_step_s_end(clock: ProgressClock) -> None:
    other = ProgressClock(os.dup(clock.descriptor))
    clock.begin_step(100.0, 5.0)
    assert other.batch() is None
    clock.note_batch([7, 2**40, 1])
    assert other.batch() == {7, 2**40, 1}
    assert other.overdue_seconds(105.5, 1.0) == pytest.approx(0.5)
    clock.beat(101.0)
    assert other.batch() is None
    clock.begin_step(102.0, 5.0)
    clock.note_batch(range(MAX_NOTED))
    assert other.batch() == set(range(MAX_NOTED))
    clock.begin_step(103.0, 5.0)
    clock.note_batch(range(MAX_NOTED + 1))
    assert other.batch() is None
    other.close()


def _judge(clock: ProgressClock, now: float) -> Judge:
    return Judge(clock, now, idle_bound_seconds=5.0, pause_seconds=0.2)


def test_a_worker_is_not_blamed_for_the_time_in_which_its_judge_stood_still(clock: ProgressClock) -> None:
    """A machine that was stopped for a minute woke up to a supervisor that killed the worker for it."""
    clock.begin_step(100.0, 1.0)
    judge = _judge(clock, 100.0)
    assert judge.overdue_seconds(100.1) < 0
    assert judge.overdue_seconds(160.0) < 0
    assert judge.overdue_seconds(160.1) < 0


def test_a_worker_that_hangs_before_an_awake_judge_is_overdue_however_often_the_judge_sleeps(
    clock: ProgressClock,
) -> None:
    clock.begin_step(100.0, 1.0)
    judge = _judge(clock, 100.0)
    overdue = [judge.overdue_seconds(100.0 + 0.5 * look) for look in range(1, 8)]
    assert overdue == pytest.approx([0.2 * look - 1.0 for look in range(1, 8)])


def test_what_the_judge_missed_before_the_last_sign_does_not_excuse_what_comes_after(clock: ProgressClock) -> None:
    clock.begin_step(100.0, 1.0)
    judge = _judge(clock, 100.0)
    judge.overdue_seconds(150.0)
    clock.begin_step(150.05, 1.0)
    looks = [judge.overdue_seconds(150.0 + 0.1 * look) for look in range(1, 14)]
    assert looks[-1] == pytest.approx(0.25)
    assert all(overdue < 0 for overdue in looks[:10])


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
