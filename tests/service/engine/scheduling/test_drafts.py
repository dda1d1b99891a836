"""Guessed tokens: which are guessed, when, and that answers are the same with them."""

from typing import Any

import numpy as np
import pytest

from service.engine.drafts import Drafts, continuation

REPEATING = 3
ROOMY = {"num_blocks": 64, "block_size": 4, "max_model_len": 64, "max_batch_tokens": 64}


@pytest.mark.parametrize(
    ("ids", "count", "found"),
    [
        ([7, 1, 2, 3, 9, 1, 2], 4, [3, 9, 1, 2]),
        ([7, 1, 2, 3, 9, 1, 2], 2, [3, 9]),
        ([1, 2, 3, 5, 1, 2, 4, 5, 1, 2], 1, [4]),  # the latest of equally long places
        ([1, 2, 3, 9, 2, 4, 9, 1, 2], 1, [3]),  # the longest place, though another is later
        ([8, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # what repeats goes on repeating
        ([6, 6, 6], 3, [6, 6, 6]),
        ([1, 2, 3, 4], 3, []),
        ([1, 5, 2, 5], 3, []),  # one id is no reason
        ([4], 3, []),
    ],
)
def test_what_followed_before_is_guessed_to_follow(ids: list[int], count: int, found: list[int]) -> None:
    assert continuation(np.array(ids), count) == found


def test_guesses_go_as_far_as_their_record_bears_them() -> None:
    drafts = Drafts([1, 2, 3] * 20)
    assert drafts.odds == pytest.approx(2 / 3)
    assert drafts.draft(16, 0.4) == [1, 2]  # (2/3)^2 = 0.44
    for _ in range(20):
        drafts.learn([1, 2, 3], num_drafted=2)
    assert drafts.odds > 0.9
    assert len(drafts.draft(16, 0.4)) >= 8
    for _ in range(20):
        drafts.learn([5], num_drafted=2)
    assert drafts.odds < 0.35
    assert drafts.draft(16, 0.4) == []


def test_who_guesses_badly_is_tried_again_some_time() -> None:
    drafts = Drafts([1, 2] * 20)
    for _ in range(20):
        drafts.learn([5, 1, 2], num_drafted=0)
        drafts.learn([1], num_drafted=4)
        drafts.learn([2], num_drafted=0)
    assert drafts.draft(4, 0.5) == []
    assert any(drafts.draft(4, 0.5) for _ in range(50))


def test_what_is_written_is_guessed_from_too() -> None:
    drafts = Drafts([1])
    for token in [4, 5, 6, 7] * 50:
        drafts.learn([token], num_drafted=0)
    assert drafts.draft(3, 0.0) == [4, 5, 6]


def seconds_of(batch: Any) -> float:
    return 0.01 + 0.001 * float(batch.num_tokens)


def steps_of(service: Any) -> int:
    return sum(bool(batch.rows) for batch in service.batches)


def test_a_text_that_repeats_takes_fewer_steps_and_stays_the_same(make_service: Any, make_request: Any) -> None:
    counts = []
    for tokens in (0, 4):
        service = make_service(num_blocks=16, block_size=4, max_model_len=64, speculative_tokens=tokens)
        service.add(make_request([1, 2, 3], max_tokens=40, seed=REPEATING))
        service.finish()
        assert len(service.given[next(iter(service.requests))]) == 40
        counts.append(steps_of(service))
    assert counts[0] == 40
    assert counts[1] <= 20


def test_what_ends_a_text_ends_it_behind_guesses_too(make_service: Any, make_request: Any) -> None:
    for stop in range(12):
        service = make_service(num_blocks=16, block_size=4, max_model_len=64, speculative_tokens=8)
        service.add(make_request([1, 2, 3], max_tokens=40, min_tokens=17, stop_ids=(stop,), seed=REPEATING))
        service.finish()


def test_nothing_is_guessed_beside_prompts_and_of_what_was_not_asked_for(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=32, block_size=4, max_model_len=64, speculative_tokens=4, prefill_chunk=2)
    service.add(make_request([1, 2, 3], max_tokens=20, seed=REPEATING))
    service.add(make_request([1, 2, 3], max_tokens=20, seed=REPEATING, repetition_penalty=1.5))
    for _ in range(14):
        service.step()
    service.add(make_request([5] * 16, max_tokens=2))
    service.finish()
    drafted = [batch for batch in service.batches if any(row.num_drafted for row in batch.rows)]
    assert drafted
    for batch in drafted:
        assert all(len(row.token_ids) == 1 + row.num_drafted for row in batch.rows)
        assert not any(row.num_drafted for row in batch.rows if row.sampling.repetition_penalty != 1.0)
    service = make_service(num_blocks=32, block_size=4, max_model_len=64)
    service.add(make_request([1, 2, 3], max_tokens=20, seed=REPEATING))
    service.finish()
    assert not any(row.num_drafted for batch in service.batches for row in batch.rows)


def test_guesses_take_no_block_that_others_may_need(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=8, block_size=2, max_model_len=16, max_sequences=2, speculative_tokens=8)
    for _ in range(2):
        service.add(make_request([1, 2], max_tokens=6, seed=REPEATING))
    service.finish()
    assert not any(batch.block_copies for batch in service.batches)
    assert service.scheduler.num_preempted == 0


def test_guesses_cost_what_they_save(make_service: Any, make_request: Any) -> None:
    """Where a row costs as much as a step, nothing is gained by guessing; where it costs next to nothing, much is."""
    counts = []
    for row_seconds in (1.0, 0.001):
        service = make_service(
            **ROOMY,
            speculative_tokens=8,
            seconds_of=lambda batch, cost=row_seconds: 0.01 + cost * batch.num_tokens,
        )
        for start in range(4):
            service.add(make_request([start, 2, 3], max_tokens=40, seed=REPEATING))
        service.finish()
        counts.append(sum(row.num_drafted for batch in service.batches for row in batch.rows))
    assert counts[0] < counts[1] / 4


def test_a_step_with_nobody_in_it_guesses_nothing(make_service: Any, make_request: Any) -> None:
    """What a guess is worth was divided by the number of rows that decode, none of which there are when a refusal is
    all that a step delivers: the worker died of it."""
    service = make_service(num_blocks=16, block_size=4, max_model_len=64, speculative_tokens=4, seconds_of=seconds_of)
    for start in range(3):
        service.add(make_request([start, 2, 3], max_tokens=20 + start, seed=REPEATING))
    service.finish()
    assert not service.step().rows


@pytest.mark.parametrize("num_blocks", range(24, 60, 4))
def test_guesses_leave_those_behind_them_their_next_block(
    make_service: Any, make_request: Any, num_blocks: int
) -> None:
    """The first took the last free blocks for its guesses, and who came after it in the same step gave way."""
    service = make_service(
        num_blocks=num_blocks,
        block_size=1,
        max_model_len=24,
        max_batch_tokens=64,
        max_sequences=6,
        speculative_tokens=8,
    )
    for start in range(6):
        service.add(make_request([start, 2, 3], max_tokens=20 - 2 * start, seed=REPEATING))
    planner = service.scheduler._planner
    while service.scheduler.has_work:
        needed = sum(planner.placement.num_blocks_to_step(sequence) for sequence in planner.running)
        suffices = needed <= service.blocks.num_free
        service.step()
        assert not (suffices and service.scheduler.num_preempted)
    service.finish()


def test_blocks_of_wrong_guesses_are_free_again(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=32, block_size=2, max_model_len=48, speculative_tokens=8)
    service.add(make_request([1, 2] * 8, max_tokens=20))
    while service.scheduler.has_work:
        service.step()
        for sequence in service.scheduler._planner.running:
            (branch,) = sequence.branches
            assert len(branch.block_ids) == service.blocks.num_blocks_for(branch.num_tokens - bool(branch.output_ids))
    assert any(row.num_drafted for batch in service.batches for row in batch.rows)


def test_sources_count_as_what_a_step_computes(make_service: Any, make_request: Any) -> None:
    """A step that encoded a long source beside one token of its answer passed for one that decodes."""
    costs = []
    for num_source in (1, 40):
        service = make_service(
            **ROOMY,
            speculative_tokens=4,
            seconds_of=seconds_of,
        )
        for start in range(12):
            service.add(make_request([0], encoder_ids=[start] * num_source, max_tokens=4, seed=REPEATING))
            for _ in range(2):
                service.step()
        service.finish()
        costs.append(service.scheduler._planner._costs.least_odds(1))
    assert costs[1] == pytest.approx(1 / 11, rel=0.05)
    assert costs[0] == pytest.approx(1 / 11, rel=0.05)
