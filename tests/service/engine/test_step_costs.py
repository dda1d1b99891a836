"""What steps cost is found out from what they took; seconds are given, no clock is read."""

import random

import pytest

from service.engine.step_costs import StepCosts

PER_STEP, PER_ROW, PER_PROMPT_TOKEN = 0.015, 0.0015, 0.001


def seconds(num_decoding: int, num_prompt_tokens: int) -> float:
    return PER_STEP + PER_ROW * num_decoding + PER_PROMPT_TOKEN * num_prompt_tokens


def tokens(num_decoding: int, stretch: float) -> float:
    """The answer that is right."""
    return (stretch - 1) * seconds(num_decoding, 0) / PER_PROMPT_TOKEN


def warmed(noise: float = 0.0) -> StepCosts:
    """After two bursts of prompts, the first of which found nobody decoding."""
    costs, chance = StepCosts(), random.Random(3)
    for _ in range(2):
        for num_decoding in (0, 4, 8, 12, 16):
            for num_prompt_tokens in (512 - num_decoding, 24, 40, 0, 0):
                held_up = 1 + abs(chance.gauss(0, noise))
                costs.record(num_decoding, num_prompt_tokens, seconds(num_decoding, num_prompt_tokens) * held_up)
                costs.num_prompt_tokens(num_decoding, num_decoding, 2.5)
    return costs


@pytest.mark.parametrize("num_decoding", [1, 4, 16, 64])
def test_a_guess_pays_from_its_share_of_a_turn_on(num_decoding: int) -> None:
    turn = PER_STEP / num_decoding + PER_ROW
    assert warmed().least_odds(num_decoding) == pytest.approx(PER_ROW / turn, rel=0.05)
    assert StepCosts().least_odds(num_decoding) == 0


@pytest.mark.parametrize("num_decoding", [1, 4, 16, 64])
@pytest.mark.parametrize("stretch", [1.5, 2.5])
def test_prompts_take_what_they_may(num_decoding: int, stretch: float) -> None:
    assert warmed().num_prompt_tokens(num_decoding, num_decoding, stretch) == pytest.approx(
        tokens(num_decoding, stretch), rel=0.05
    )


def test_those_who_do_not_decode_yet_count_with_those_who_do() -> None:
    found = warmed().num_prompt_tokens(4, 16, 2.5)
    assert seconds(4, found) == pytest.approx(2.5 * seconds(16, 0), rel=0.05)


def test_steps_that_are_a_little_slower_now_and_then_are_no_obstacle() -> None:
    assert warmed(noise=0.1).num_prompt_tokens(16, 16, 2.5) == pytest.approx(tokens(16, 2.5), rel=0.15)


def test_before_anything_is_known_there_is_no_answer() -> None:
    costs = StepCosts()
    assert costs.num_prompt_tokens(4, 4, 2.5) == 0
    costs.record(4, 0, seconds(4, 0))
    assert costs.num_prompt_tokens(4, 4, 2.5) == 0


def test_one_step_beside_others_is_enough_to_go_by() -> None:
    costs = StepCosts()
    costs.record(0, 512, seconds(0, 512))
    costs.record(4, 16, seconds(4, 16))
    assert costs.num_prompt_tokens(4, 4, 2.5) == pytest.approx(tokens(4, 2.5), rel=0.2)


def test_a_step_that_was_held_up_weighs_little() -> None:
    costs = warmed()
    costs.record(16, 30, 20 * seconds(16, 30))
    costs.record(16, 0, 20 * seconds(16, 0))
    assert costs.num_prompt_tokens(16, 16, 2.5) == pytest.approx(tokens(16, 2.5), rel=0.1)


def test_what_prompts_cost_is_not_forgotten_while_there_are_none() -> None:
    costs = warmed()
    for _ in range(1000):
        costs.record(16, 0, seconds(16, 0))
    assert costs.num_prompt_tokens(16, 16, 2.5) == pytest.approx(tokens(16, 2.5), rel=0.1)


def test_costs_that_have_changed_are_learned_anew() -> None:
    """Contexts have grown: decoding takes twice as long, prompts four times as long."""
    costs = warmed()
    for _ in range(60):
        costs.record(16, 0, 2 * seconds(16, 0))
        costs.record(16, 30, seconds(16, 0) * 2 + 30 * PER_PROMPT_TOKEN * 4)
        costs.num_prompt_tokens(16, 16, 2.5)
    assert costs.num_prompt_tokens(16, 16, 2.5) == pytest.approx(tokens(16, 2.5) / 2, rel=0.1)
