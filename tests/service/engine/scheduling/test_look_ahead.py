"""Steps made before the results of the last one are known: what they share, whom they leave out, when they wait."""

from typing import Any

import pytest

from model.batch import BeamParams


def test_a_row_goes_on_from_the_token_that_nobody_knows_yet(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=20, block_size=4, look_ahead=True)
    service.add(make_request([1, 2, 3], max_tokens=5))
    first, second = service.step(), service.step()
    assert [(row.fed, row.start, row.samples) for row in first.rows + second.rows] == [
        (False, 0, True),
        (True, 3, True),
    ]


def test_a_row_that_can_have_no_more_tokens_is_left_out(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=20, block_size=4, look_ahead=True)
    service.add(make_request([1, 2, 3], max_tokens=2))
    assert [len(service.step().rows) for _ in range(3)] == [1, 1, 0]
    assert service.ends


@pytest.mark.parametrize("look_ahead", [False, True])
def test_blocks_filled_by_answers_are_found_by_who_asks_on(
    make_service: Any, make_request: Any, look_ahead: bool
) -> None:
    service = make_service(num_blocks=20, block_size=2, look_ahead=look_ahead)
    request = make_request([1, 2, 3], max_tokens=8)
    service.add(request)
    service.finish()
    known = [1, 2, 3, *service.given[request.request_id]]
    again = make_request([*known, 5], max_tokens=1)
    service.add(again)
    service.finish()
    assert service.cached[again.request_id] == 10  # the last answered token was never computed


def test_a_failed_step_takes_the_one_made_after_it_along(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=40, block_size=2, look_ahead=True)
    for seed in range(3):
        service.add(make_request([1, 2, 3, seed], max_tokens=6))
    service.step()
    service.step(landing_fails=True)
    assert service.flight is None
    service.finish()
    assert set(service.ends.values()) <= {"stop", "length"}


@pytest.mark.parametrize("fields", [{"beam": BeamParams(num_beams=2)}, {"prompt_logprobs": 0}], ids=["beams", "scored"])
def test_who_must_see_the_results_first_is_waited_for(make_service: Any, make_request: Any, fields: Any) -> None:
    service = make_service(num_blocks=40, block_size=2, look_ahead=True)
    service.add(make_request([1, 2, 3], max_tokens=6, **fields))
    service.step()
    assert not service.scheduler.can_look_ahead


def test_nobody_gives_way_while_a_token_of_his_is_on_its_way(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=6, block_size=2, look_ahead=True)
    for seed in range(2):
        service.add(make_request([1, 2, seed], max_tokens=6))
    waited = 0
    while service.scheduler.has_work or service.flight is not None:
        waited += service.flight is not None and not service.scheduler.can_look_ahead
        service.step()
    assert waited > 0
    assert service.num_ahead > 0
    service.finish()
