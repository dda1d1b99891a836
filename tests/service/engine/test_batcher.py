"""The batcher's laws: fair turns, little padding, nothing lost."""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from service.engine.batcher import Batcher, Item
from service.engine.protocol import Encode, EncodeInput

NUM_HISTORIES = int(os.environ.get("HISTORIES", "100"))


@pytest.fixture
def make_encode() -> Callable[..., Encode]:
    """`make_encode([3, 5])` asks for two texts of 3 and 5 tokens."""
    numbers = iter(range(1_000_000))

    def make(lengths: list[int], **fields: Any) -> Encode:
        inputs = [EncodeInput(ids=[0] * length) for length in lengths]
        return Encode(request_id=next(numbers), model="m", output="embedding", inputs=inputs, **fields)

    return make


def lengths_of(batch: list[Item]) -> list[int]:
    return [item.length for item in batch]


def requests_of(batch: list[Item]) -> list[int]:
    return [item.request_id for item in batch]


def test_whatever_waits_goes_at_once_shortest_first(make_encode: Any) -> None:
    batcher = Batcher(100)
    batcher.add(make_encode([9, 8]))
    batcher.add(make_encode([10]))
    assert lengths_of(batcher.next_batch()) == [8, 9, 10]
    assert batcher.next_batch() == []
    assert (batcher.num_waiting, batcher.num_waiting_tokens) == (0, 0)


def test_a_batch_stays_within_the_budget(make_encode: Any) -> None:
    batcher = Batcher(100, max_batch_items=8)
    batcher.add(make_encode([30] * 20))
    batcher.add(make_encode([1] * 20))
    while batcher.num_waiting:
        batch = batcher.next_batch()
        assert sum(lengths_of(batch)) <= 100
        assert len(batch) <= 8


def test_a_batch_that_nobody_else_waits_for_has_a_budget_of_its_own(make_encode: Any) -> None:
    batcher = Batcher(100, max_tokens_alone=400)
    batcher.add(make_encode([30] * 40))
    assert [len(batcher.next_batch(alone=alone)) for alone in (False, True, False)] == [3, 13, 3]


def test_a_batch_is_bounded_by_its_tokens_and_not_by_a_few_texts(make_encode: Any) -> None:
    """text-embeddings-inference takes 4 or 8 texts at most on CPUs, however short they are."""
    batcher = Batcher(512)
    batcher.add(make_encode([4] * 128))
    assert lengths_of(batcher.next_batch()) == [4] * 128


def test_an_item_longer_than_the_budget_runs_alone(make_encode: Any) -> None:
    batcher = Batcher(100)
    batcher.add(make_encode([5, 250, 5]))
    batches = []
    while batcher.num_waiting:
        batches.append(lengths_of(batcher.next_batch()))
    assert sorted(batches) == [[5, 5], [250]]


def test_a_request_of_one_item_is_not_delayed_by_one_of_two_thousand(make_encode: Any) -> None:
    batcher = Batcher(640)
    batcher.add(make_encode([32] * 2000))
    for _ in range(3):
        batcher.next_batch()
    single = make_encode([200])
    batcher.add(single)
    waited = 0
    while single.request_id not in requests_of(batcher.next_batch()):
        waited += 1
    assert waited <= 1


def test_a_request_of_one_item_is_not_delayed_by_one_of_many_lengths(make_encode: Any) -> None:
    """Neighbours in length overtake each other: those left behind lost their patience with whoever came later."""
    random_ = random.Random(7)
    batcher = Batcher(640)
    batcher.add(make_encode([random_.randrange(20, 200) for _ in range(2000)]))
    for _ in range(50):
        batcher.next_batch()
        single = make_encode([8])
        batcher.add(single)
        assert single.request_id in requests_of(batcher.next_batch())


def test_two_large_requests_advance_side_by_side(make_encode: Any) -> None:
    batcher = Batcher(640)
    first, second = make_encode([32] * 400), make_encode([32] * 400)
    batcher.add(first)
    batcher.add(second)
    served = [0, 0]
    for _ in range(10):
        for number in requests_of(batcher.next_batch()):
            served[number] += 1
        # The window reaches eight budgets ahead.
        assert abs(served[0] - served[1]) * 32 <= 9 * 640


def test_requests_of_one_flow_share_its_turn(make_encode: Any) -> None:
    batcher = Batcher(64)
    for _ in range(50):
        batcher.add(make_encode([32]), flow="greedy")
    batcher.add(make_encode([32]), flow="modest")
    first, second = batcher.next_batch(), batcher.next_batch()
    assert 50 in requests_of(first) + requests_of(second)


def test_padding_under_a_deep_queue_stays_below_a_tenth(make_encode: Any) -> None:
    chance = random.Random(0)
    batcher = Batcher(4096)
    for _ in range(400):
        batcher.add(make_encode([min(512, int(chance.lognormvariate(4, 1)) + 1) for _ in range(chance.randint(1, 30))]))
    tokens = padded = num_batches = 0
    while batcher.num_waiting > 500:
        lengths = lengths_of(batcher.next_batch())
        tokens += sum(lengths)
        padded += len(lengths) * max(lengths)
        num_batches += 1
    assert padded - tokens < 0.1 * tokens
    assert tokens / num_batches > 4096 / 2


def test_an_outlier_waits_no_longer_than_its_turn(make_encode: Any) -> None:
    batcher = Batcher(256)
    batcher.add(make_encode([16] * 64))
    outlier = make_encode([256])
    batcher.add(outlier)
    waited = 0
    while outlier.request_id not in requests_of(batcher.next_batch()):
        batcher.add(make_encode([16] * 16))
        waited += 1
        assert waited < 3


def test_arrivals_without_end_do_not_starve_who_is_here(make_encode: Any) -> None:
    batcher = Batcher(256)
    patient = make_encode([16] * 100)
    batcher.add(patient)
    num_batches = 0
    while patient.request_id in batcher.request_ids:
        batcher.add(make_encode([16] * 16))
        batcher.next_batch()
        num_batches += 1
        # Twice what it brought, 1,600 tokens, and a window, eight times 256.
        assert num_batches < 2 * (1600 + 8 * 256) / 256 + 2


def test_a_newcomer_does_not_catch_up_on_what_others_had_before_it_came(make_encode: Any) -> None:
    batcher = Batcher(64)
    batcher.add(make_encode([16] * 200))
    for _ in range(20):
        batcher.next_batch()
    batcher.add(make_encode([16] * 200))
    served = [0, 0]
    for _ in range(24):
        for number in requests_of(batcher.next_batch()):
            served[number] += 1
    assert sum(served) == 96
    assert abs(served[0] - served[1]) <= 8


def test_higher_priority_goes_first_and_leftover_budget_is_used(make_encode: Any) -> None:
    batcher = Batcher(100)
    batcher.add(make_encode([40, 40]))
    urgent = make_encode([50], priority=1)
    batcher.add(urgent)
    assert sorted(requests_of(batcher.next_batch())) == [0, 1]
    assert requests_of(batcher.next_batch()) == [0]


def test_cancelled_and_expired_items_come_back_as_ended(make_encode: Any) -> None:
    batcher = Batcher(60)
    doomed, late, fine = make_encode([50, 50]), make_encode([50], deadline=5.0), make_encode([50])
    for request in (doomed, late, fine):
        batcher.add(request)
    [item] = batcher.next_batch()
    assert item.request_id == doomed.request_id
    ended = batcher.cancel(doomed.request_id)
    assert [(result.index, result.reason) for result in ended] == [(1, "cancelled")]
    assert batcher.cancel(doomed.request_id) == []
    assert batcher.expire(4.9) == []
    assert [(result.request_id, result.reason) for result in batcher.expire(5.0)] == [(late.request_id, "deadline")]
    assert requests_of(batcher.next_batch()) == [fine.request_id]
    assert batcher.num_waiting == 0


class History(RuleBasedStateMachine):
    """Arrivals, cancels, deadlines and batches in any order; every item must come back exactly once."""

    def __init__(self, make_encode: Callable[..., Encode]) -> None:
        super().__init__()
        self.make_encode = make_encode
        self.waiting: dict[tuple[int, int], int] = {}
        self.urgency: dict[int, int] = {}
        self.now = 0.0

    @initialize(budget=st.integers(1, 60), max_items=st.integers(1, 8))
    def start(self, budget: int, max_items: int) -> None:
        self.batcher = Batcher(budget, max_items)
        self.budget, self.max_items = budget, max_items

    @rule(
        lengths=st.lists(st.integers(0, 40), max_size=12),
        priority=st.sampled_from([0, 0, 1]),
        lifetime=st.sampled_from([None, None, 2, 5]),
        flow=st.sampled_from([None, "a", "b"]),
    )
    def add(self, lengths: list[int], priority: int, lifetime: int | None, flow: str | None) -> None:
        deadline = None if lifetime is None else self.now + lifetime
        request = self.make_encode(lengths, priority=priority, deadline=deadline)
        self.batcher.add(request, flow=flow)
        self.urgency[request.request_id] = priority
        for index, length in enumerate(lengths):
            self.waiting[request.request_id, index] = max(1, length)

    def _end(self, ended: list[Any]) -> None:
        for result in ended:
            del self.waiting[result.request_id, result.index]

    @precondition(lambda self: self.urgency)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.urgency)))
        self._end(self.batcher.cancel(number))
        assert all(key[0] != number for key in self.waiting)

    @rule(seconds=st.integers(1, 3))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        self._end(self.batcher.expire(self.now))

    @rule()
    def run(self) -> None:
        batch = self.batcher.next_batch()
        assert bool(batch) == bool(self.waiting)
        lengths = lengths_of(batch)
        assert lengths == sorted(lengths)
        assert sum(lengths) <= self.budget or len(batch) == 1
        assert len(batch) <= self.max_items
        if batch:
            best = max(self.urgency[key[0]] for key in self.waiting)
            assert any(self.urgency[item.request_id] == best for item in batch)
        for item in batch:
            assert self.waiting.pop((item.request_id, item.index)) == item.length
        assert self.batcher.num_waiting == len(self.waiting)
        assert self.batcher.num_waiting_tokens == sum(self.waiting.values())
        assert set(self.batcher.request_ids) == {key[0] for key in self.waiting}

    def teardown(self) -> None:
        if hasattr(self, "batcher"):
            while self.waiting:
                self.run()
            assert not self.batcher.next_batch()
            assert not self.batcher._lanes
            assert not self.batcher._flows


@pytest.mark.slow
def test_any_history_hands_out_every_item_once(make_encode: Any) -> None:
    run_state_machine_as_test(
        lambda: History(make_encode),
        settings=settings(
            max_examples=NUM_HISTORIES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=(Phase.generate, Phase.shrink),
        ),
    )
