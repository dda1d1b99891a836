"""Prompts come beside requests that decode in pieces that these can bear; time is simulated."""

import statistics
from collections.abc import Callable
from typing import Any

import pytest

from model.batch import Batch
from service.engine import planner

MIN_PROMPT_TOKENS = 4
PER_STEP, PER_ROW, PER_PROMPT_TOKEN = 0.015, 0.0015, 0.004


def seconds_of(batch: Batch) -> float:
    num_decoding = sum(len(row.token_ids) == 1 for row in batch.rows)
    return PER_STEP + PER_ROW * num_decoding + PER_PROMPT_TOKEN * (batch.num_tokens - num_decoding)


def numbers(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def lengths(batch: Batch) -> list[int]:
    return [len(row.token_ids) for row in batch.rows]


@pytest.fixture
def make_timed(make_service: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A service whose steps take `seconds_of`, with room for everything."""
    monkeypatch.setattr(planner, "MIN_PROMPT_TOKENS", MIN_PROMPT_TOKENS)

    def make(**settings: Any) -> Any:
        limits = {"max_batch_tokens": 64, "max_sequences": 16, "max_model_len": 200, "max_step_stretch": 2.5}
        return make_service(num_blocks=400, block_size=4, seconds_of=seconds_of, **{**limits, **settings})

    return make


@pytest.fixture
def make_decoding(make_timed: Any, make_request: Any) -> Callable[..., Any]:
    """A service that knows its costs, in which `count` requests decode."""

    def make(count: int, **settings: Any) -> Any:
        service = make_timed(**settings)
        for index in range(count):
            service.add(make_request(numbers(40, 1000 * index), max_tokens=100))
        for _ in range(40):
            service.step()
        assert lengths(service.step()) == [1] * count
        return service

    return make


def test_while_nothing_decodes_prompts_get_all_of_a_step(make_timed: Any, make_request: Any) -> None:
    service = make_timed()
    for start in (0, 1000):
        service.add(make_request(numbers(40, start)))
    assert lengths(service.step()) == [40, 24]
    service.finish()


def test_beside_requests_that_decode_prompts_get_what_these_bear(make_decoding: Any, make_request: Any) -> None:
    service = make_decoding(3)
    before = seconds_of(service.step())
    service.add(make_request(numbers(100, 5000)))
    batch = service.step()
    assert lengths(batch)[:3] == [1, 1, 1]
    assert 2 * before < seconds_of(batch) < 3 * before
    service.finish()


def test_the_more_will_decode_the_more_prompts_get(make_timed: Any, make_request: Any) -> None:
    found = []
    for count in (1, 10):
        service = make_timed(max_batch_tokens=200)
        for index in range(8):
            service.add(make_request(numbers(40, 1000 * index), max_tokens=100 if index < 3 else 20))
        for _ in range(40):
            service.step()
        for index in range(count):
            service.add(make_request(numbers(100, 10_000 + 1000 * index)))
        found.append(sum(lengths(service.step())))
    assert found[1] > 1.3 * found[0]


def test_more_stretch_gives_prompts_more(make_decoding: Any, make_request: Any) -> None:
    found = []
    for stretch in (1.5, 2.5, 100.0):
        service = make_decoding(3, max_step_stretch=stretch)
        service.add(make_request(numbers(100, 5000)))
        found.append(lengths(service.step())[-1])
    assert found[0] < found[1] < found[2] == 64 - 3


def test_prompts_get_on_whatever_decodes(make_decoding: Any, make_request: Any) -> None:
    service = make_decoding(3, max_step_stretch=1.0)
    service.add(make_request(numbers(100, 5000)))
    assert lengths(service.step()) == [1, 1, 1, MIN_PROMPT_TOKENS]
    service.finish()


def test_a_step_never_has_more_than_its_tokens(make_decoding: Any, make_request: Any) -> None:
    service = make_decoding(3, max_batch_tokens=8)
    service.add(make_request(numbers(100, 5000)))
    assert lengths(service.step()) == [1, 1, 1, 5]
    service.finish()


def test_prompts_come_one_after_the_other_and_the_urgent_first(make_decoding: Any, make_request: Any) -> None:
    service = make_decoding(3)
    usual = [make_request(numbers(40, start)) for start in (5000, 6000, 7000)]
    urgent = make_request(numbers(40, 8000), priority=1)
    for request in (*usual, urgent):
        service.add(request)
    order = []
    for _ in range(60):
        rows = service.step().rows
        order += [row.sequence_id for row in rows if row.samples and not row.output_ids[1:]]
    order = list(dict.fromkeys(order))
    assert order == [request.request_id for request in (urgent, *usual)]
    service.finish()


def test_a_source_that_is_more_than_they_bear_has_a_step_of_its_own(make_decoding: Any, make_request: Any) -> None:
    service = make_decoding(3)
    source = make_request([2], encoder_ids=numbers(50), max_tokens=2)
    service.add(source)
    assert [row.sequence_id for row in service.step().rows] == [source.request_id]
    service.finish()


def gaps_of(service: Any, make_request: Any, *, num_streams: int, num_requests: int) -> list[float]:
    """Seconds between the tokens of clients who each ask again when they have their answer."""
    gaps: list[float] = []
    last: dict[int, float] = {}
    num_added = 0
    for _ in range(2000):
        if len(service.ends) == num_requests:
            break
        while num_added < min(num_requests, len(service.ends) + num_streams):
            service.add(make_request(numbers(32, 1000 * num_added), max_tokens=16))
            num_added += 1
        before = {number: len(ids) for number, ids in service.given.items()}
        service.step()
        for number, count in before.items():
            if len(service.given[number]) > count:
                gaps += [service.now - last[number]] if number in last else []
                last[number] = service.now
    return gaps


@pytest.mark.parametrize(("stretch", "is_even"), [(2.5, True), (None, False)])
def test_the_slowest_tokens_take_three_times_the_usual_while_prompts_arrive(
    stretch: float | None, is_even: bool, make_timed: Any, make_request: Any
) -> None:
    service = make_timed(max_step_stretch=stretch)
    gaps = gaps_of(service, make_request, num_streams=8, num_requests=40)
    assert len(gaps) == 40 * 15
    percentile = statistics.quantiles(gaps, n=100)[98]
    assert (percentile <= 3 * statistics.median(gaps)) == is_even
