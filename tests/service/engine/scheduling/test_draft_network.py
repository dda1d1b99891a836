"""Guesses of a draft network: what it computes, when, and which of its passes pay.

That it never reads what is not there, or is another text's, the fake draft checks at every step.
"""

from typing import Any

import pytest

from model.batch import Batch, SamplingParams
from model.block_manager import BlockManager
from service.engine import guesser
from service.engine.drafts import Record
from service.engine.guesser import Guesser
from service.engine.placement import Placement
from service.engine.rows import Step
from service.engine.sequence import Sequence
from service.engine.step_costs import StepCosts

ROOMY: dict[str, Any] = {
    "num_blocks": 64, "block_size": 4, "max_model_len": 64, "max_batch_tokens": 64,
    "speculative_tokens": 4, "draft_len": 64,
}  # fmt: skip


def num_guessed(batches: list[Batch]) -> int:
    return sum(row.num_drafted for batch in batches for row in batch.rows)


def draft_tokens(batch: Batch) -> int:
    return sum(len(row.draft_ids) for row in batch.rows)


def priced(share: float) -> dict[str, Any]:
    """A pass of the draft takes such a share of a large step."""

    def draft_seconds_of(batch: Batch) -> float:
        return share * 0.01 * max([row.num_drafted for row in batch.rows], default=0)

    def seconds_of(batch: Batch) -> float:
        return 0.01 + 0.0001 * batch.num_tokens + draft_seconds_of(batch)

    return {"seconds_of": seconds_of, "draft_seconds_of": draft_seconds_of}


def test_what_is_guessed_takes_fewer_steps_and_stays_the_same(make_service: Any, make_request: Any) -> None:
    service = make_service(**ROOMY)
    for start in range(3):
        service.add(make_request([start, 2, 3], max_tokens=40))
    service.finish()
    assert sum(bool(batch.rows) for batch in service.batches) < 30


def test_prompts_are_followed_chunk_by_chunk_and_equal_ones_once(make_service: Any, make_request: Any) -> None:
    service = make_service(**ROOMY, prefill_chunk=8)
    prompt = list(range(6)) * 4
    service.add(make_request(prompt, max_tokens=2))
    for _ in range(3):
        (row,) = service.step().rows
        assert (row.draft_start, row.draft_ids) == (row.start, row.token_ids)
    service.finish()
    before = service.runner.draft.num_computed
    service.add(make_request([*prompt[:20], 7, 8], max_tokens=2))
    service.step()
    assert service.runner.draft.num_computed == before + 2


def test_requests_that_are_never_guessed_for_cost_the_draft_nothing(make_service: Any, make_request: Any) -> None:
    service = make_service(**ROOMY)
    service.add(make_request([1, 2, 3], max_tokens=10, repetition_penalty=1.2))
    service.add(make_request([1, 2, 3], max_tokens=1))
    service.add(make_request([4, 2, 3], max_tokens=0, prompt_logprobs=0))
    service.finish()
    assert service.runner.draft.num_computed == 0


def test_what_it_has_missed_is_caught_up_with_piece_by_piece(
    make_service: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the whole prompt, which another request had computed whose tokens cannot be guessed."""
    monkeypatch.setattr(guesser, "CATCH_UP_TOKENS", 6)
    service = make_service(**ROOMY)
    prompt = list(range(8)) * 4
    service.add(make_request(prompt, max_tokens=2, repetition_penalty=1.2))
    service.finish()
    service.add(make_request(prompt, max_tokens=20))
    service.scheduler._planner._guesser.progress.follows_prompts = False
    service.step()
    batches = [service.step() for _ in range(5)]
    assert [draft_tokens(batch) for batch in batches[:4]] == [8, 8, 8, 8]
    assert num_guessed(batches[:4]) == 0
    assert num_guessed(batches[4:]) > 0
    service.finish()


def test_past_the_drafts_context_nothing_is_guessed(make_service: Any, make_request: Any) -> None:
    service = make_service(**{**ROOMY, "draft_len": 16})
    service.add(make_request([1, 2, 3], max_tokens=40))
    service.finish()
    guessed = [row for batch in service.batches for row in batch.rows if row.num_drafted]
    assert guessed
    assert max(row.start + row.num_drafted for row in guessed) <= 16


def test_a_draft_that_does_not_pay_is_seldom_asked_and_follows_no_prompts(make_service: Any, make_request: Any) -> None:
    counts = []
    for share in (0.05, 3.0):
        service = make_service(**{**ROOMY, "num_blocks": 200, "max_model_len": 400}, **priced(share))
        service.add(make_request([1, 2, 3], max_tokens=300))
        service.finish()
        service.add(make_request([4, 5, 6] * 5, max_tokens=2))
        counts.append((num_guessed(service.batches), draft_tokens(service.step())))
    (many, followed), (few, left) = counts
    assert few < many / 10
    assert few >= 2
    assert (followed, left) == (15, 0)


def test_a_draft_is_tried_again_even_if_it_has_to_catch_up_first(
    make_service: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try was one step, in which a long text was caught up with in part, for nothing."""
    monkeypatch.setattr(guesser, "CATCH_UP_TOKENS", 6)
    monkeypatch.setattr(guesser, "STEPS_BETWEEN_TRIES", 20)
    service = make_service(**{**ROOMY, "num_blocks": 200, "max_model_len": 400, "draft_len": 400}, **priced(3.0))
    service.add(make_request([1, 2, 3], max_tokens=20))
    service.finish()
    before = num_guessed(service.batches)
    service.add(make_request([4, 5, 6] * 10, max_tokens=200))
    service.finish()
    assert 3 <= num_guessed(service.batches) - before <= 12


def make_guesser(odds: list[float], *, row: float, share: float) -> tuple[Guesser, list[Sequence]]:
    """With so many turns for a row, and the draft's share of a step."""
    costs = StepCosts()
    costs.least_odds = lambda _: row  # type: ignore[method-assign]
    made = Guesser(Placement(BlockManager(8, 4)), costs, 5, draft_len=64, watermark=1)
    costs.share_of = lambda _: share  # type: ignore[method-assign]
    sequences = [Sequence(number, [1], SamplingParams(max_tokens=9)) for number in range(len(odds))]
    for sequence, chance in zip(sequences, odds, strict=True):
        sequence.max_output = 9
        sequence.drafts = Record()
        sequence.drafts._tried, sequence.drafts._right = 1e9, 1e9 * chance
    return made, sequences


@pytest.mark.parametrize(
    ("odds", "row", "share", "depth"),
    [
        ([0.8, 0.5, 0.5, 0.1], 0.1, 0.2, 2),  # the worked example
        ([0.8], 0.1, 0.2, 5),
        ([0.3], 0.1, 0.2, 1),
        ([0.25], 0.1, 0.2, 0),
        ([0.9] * 16, 0.5, 0.2, 3),
        ([0.9] + [0.3] * 15, 0.5, 0.2, 0),  # nobody shares the pass
        ([0.9], 0.1, 0.0, 5),
    ],
)
def test_a_pass_is_made_if_those_who_want_it_save_more_than_it_costs(
    odds: list[float], row: float, share: float, depth: int
) -> None:
    made, sequences = make_guesser(odds, row=row, share=share)
    made.begin_step(Step(budget=64), sequences)
    assert made._most_now == depth


def test_requests_begin_with_what_is_known_of_others() -> None:
    usual = Record(memory=0.99)
    before = Record(usual)
    assert before.odds == pytest.approx(2 / 3)
    for _ in range(50):
        before.learn([5, 6, 7, 8], num_drafted=3)
    assert usual.odds > 0.95
    assert Record(usual).odds == pytest.approx(usual.odds)
    worse = Record(usual)
    for _ in range(20):
        worse.learn([5], num_drafted=1)
    assert worse.odds < 0.4 < usual.odds
