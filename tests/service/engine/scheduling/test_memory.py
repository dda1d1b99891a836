"""Steps that the device has no memory for: nobody pays for others, and they do not come again and again."""

from typing import Any

import pytest

from service.engine.planner import MIN_BATCH_TOKENS


def numbers(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


@pytest.fixture
def crowd(make_service: Any, make_request: Any) -> Any:
    """Twelve prompts of 40 tokens in steps of 480, which memory is too short for by a quarter."""
    service = make_service(num_blocks=400, block_size=4, max_sequences=64, max_batch_tokens=480, max_model_len=60)
    for index in range(12):
        service.add(make_request(numbers(40, 100 * index), max_tokens=4))
    service.memory_tokens = 360
    return service


def test_a_step_too_large_for_memory_fails_nobody_and_is_not_made_again(crowd: Any) -> None:
    crowd.finish()
    assert set(crowd.ends.values()) == {"length"}
    assert sum(crowd.lacks_memory(batch) for batch in crowd.batches) == 1
    assert crowd.scheduler.max_batch_tokens == 480 * 3 // 4


def test_while_the_requests_are_tried_apart_nothing_is_concluded(crowd: Any) -> None:
    crowd.step()
    assert crowd.scheduler.max_batch_tokens == 480
    crowd.step()
    assert crowd.scheduler.max_batch_tokens == 480
    crowd.finish()


def test_one_request_that_memory_is_too_short_for_fails_alone_and_makes_nobody_s_steps_smaller(
    make_service: Any, make_request: Any
) -> None:
    service = make_service(num_blocks=400, block_size=4, max_sequences=64, max_batch_tokens=480, max_model_len=60)
    for index in range(8):
        service.add(make_request(numbers(40, 100 * index), max_tokens=4, poisons=index == 5))
    service.memory_tokens = 480
    service.finish()
    assert [number for number, end in service.ends.items() if end == "error"] == [5]
    assert service.scheduler.max_batch_tokens == 480


def test_steps_do_not_become_smaller_without_end(make_service: Any, make_request: Any) -> None:
    """Where memory is too short for two rows, a request at a time still gets through."""
    service = make_service(num_blocks=400, block_size=4, max_sequences=64, max_batch_tokens=64, max_model_len=60)
    for index in range(6):
        service.add(make_request(numbers(3, 100 * index), max_tokens=3))
    service.memory_tokens = 5
    service.finish()
    assert set(service.ends.values()) == {"length"}
    assert service.scheduler.max_batch_tokens == MIN_BATCH_TOKENS


def test_a_step_that_fails_for_another_reason_makes_none_smaller(make_service: Any, make_request: Any) -> None:
    service = make_service(num_blocks=400, block_size=4, max_sequences=64, max_batch_tokens=480, max_model_len=60)
    for index in range(4):
        service.add(make_request(numbers(40, 100 * index), max_tokens=4))
    service.step(fails=True)
    service.finish()
    assert set(service.ends.values()) == {"length"}
    assert service.scheduler.max_batch_tokens == 480
