"""Accepted requests end once, whatever ends them, and whatever another's end does to them meanwhile."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.batch import SamplingParams
from service.admission import QueueLimits
from service.engine.accounting import Accounting
from service.engine.dispatch import Dispatcher
from service.engine.flight import (
    EncodeRequest,
    Errand,
    Flight,
    GenerateFlight,
    GenerateRequest,
    encode_flight,
    generate_flight,
)
from service.engine.ledger import GUILTY_DEATHS, Ledger
from service.engine.protocol import (
    Cancel,
    EncodeInput,
    EncodeResult,
    LaneStats,
    Step,
    TokenOutput,
    ToWorker,
    WorkerConfig,
)
from service.engine.shadow import Comparison
from service.engine.stream import GenerationStream
from service.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    GenerationFailed,
    InvalidGrammar,
    InvalidRequest,
    PayloadTooLarge,
    Quarantined,
    ServiceError,
    Unavailable,
)
from service.metrics import Metrics
from tests.service.engine.faults.scripted import stub_model

MakeFlight = Callable[[str], Flight]


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(WorkerConfig(models=[]))


@pytest.fixture
def worker() -> set[str]:
    """The checkpoints that the worker holds; it has died when there are none."""
    return {"m@1", "m@2"}


@pytest.fixture
def sent() -> list[ToWorker]:
    """What the worker was told."""
    return []


@pytest.fixture
async def ledger(dispatcher: Dispatcher, worker: set[str], sent: list[ToWorker]) -> Ledger:
    books = Accounting(Metrics(), QueueLimits(1000, 1_000_000), time.monotonic())
    return Ledger(dispatcher, books, send=sent.append, is_loaded=lambda key: key in worker)


@pytest.fixture
def make_flight(tmp_path: Path) -> MakeFlight:
    models = {version: stub_model("m", tmp_path, version) for version in "12"}
    numbers = itertools.count(1)

    def make(version: str) -> Flight:
        request = GenerateRequest(model=f"m@{version}", prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=8))
        return generate_flight(request, models[version], next(numbers))

    return make


def shadowed(ledger: Ledger, make_flight: MakeFlight) -> tuple[Flight, Flight]:
    """A request and its shadow, both accepted and handed to the worker."""
    original, twin = make_flight("1"), make_flight("2")
    ledger.admit(original)
    Comparison(original, twin, count=lambda _outcome: None, cancel=lambda lost: ledger.end(lost, "cancelled"))
    ledger.enter(twin)
    return original, twin


async def test_when_all_fail_each_ends_once_although_shadows_end_with_their_originals(
    ledger: Ledger, make_flight: MakeFlight
) -> None:
    """The end of a shadow, met a second time, ended a drain past its limit with a fault: streams were left without an
    error event, and the exit code was not 0."""
    pairs = [shadowed(ledger, make_flight) for _ in range(3)]
    error = Unavailable("the service is shutting down")
    ledger.fail_all(error)
    assert [(original.error, twin.outcome) for original, twin in pairs] == [(error, "cancelled")] * 3
    await asyncio.wait_for(ledger.until_empty(), 1)


async def test_a_shadow_that_ended_with_its_convicted_original_is_not_run_again(
    ledger: Ledger, dispatcher: Dispatcher, worker: set[str], make_flight: MakeFlight
) -> None:
    original, twin = shadowed(ledger, make_flight)
    original.deaths_without_progress = GUILTY_DEATHS - 1
    worker.clear()
    ledger.take_back(frozenset({original.number}))
    assert isinstance(original.error, Quarantined)
    assert (twin.outcome, twin.num_replays) == ("cancelled", 0)
    assert (len(ledger), dispatcher.num_of("m@1"), dispatcher.num_of("m@2")) == (0, 0, 0)


async def test_a_deadline_that_the_worker_finds_is_an_error_behind_the_tokens(
    ledger: Ledger, make_flight: MakeFlight
) -> None:
    """It was a finish reason that no client knows, and a 200."""
    flight = make_flight("1")
    assert isinstance(flight, GenerateFlight)
    ledger.admit(flight)
    late = TokenOutput(request_id=flight.number, token_ids=[7], finish_reason="deadline")
    ledger.take_step(Step(model="m@1", tokens=[late], stats=LaneStats()), None)
    stream = GenerationStream(flight, ledger.end)
    output = await anext(stream)
    assert (output.token_ids, output.finish_reason) == ([7], None)
    with pytest.raises(DeadlineExceeded):
        await anext(stream)


@pytest.mark.parametrize(
    ("blame", "error"),
    [
        ("context", ContextLengthExceeded),
        ("request", InvalidRequest),
        ("grammar", InvalidGrammar),
        (None, GenerationFailed),
    ],
)
async def test_what_the_worker_refuses_is_the_callers_fault_unless_it_had_been_run(
    ledger: Ledger, make_flight: MakeFlight, blame: Any, error: type[ServiceError]
) -> None:
    """Beams or lengths that no cache could hold were a 500."""
    for has_run in (False, True):
        flight = make_flight("1")
        ledger.admit(flight)
        if has_run:
            ran = TokenOutput(request_id=flight.number, token_ids=[7])
            ledger.take_step(Step(model="m@1", tokens=[ran], stats=LaneStats()), None)
        refused = TokenOutput(request_id=flight.number, finish_reason="error", error="why", blame=blame)
        ledger.take_step(Step(model="m@1", tokens=[refused], stats=LaneStats()), None)
        assert type(flight.error) is (GenerationFailed if has_run else error)


async def test_an_errand_knows_what_its_requests_have_computed_however_they_ended(
    ledger: Ledger, make_flight: MakeFlight
) -> None:
    errand = Errand()
    waiting, given_up, late = make_flight("1"), make_flight("1"), make_flight("1")
    for flight in (waiting, given_up, late):
        flight.errand = errand
        ledger.admit(flight)
    ids = [given_up.number, late.number]
    tokens = [TokenOutput(request_id=number, token_ids=[7, 8, 9], num_cached_tokens=1) for number in ids]
    ledger.take_step(Step(model="m@1", started_ids=ids, tokens=tokens, stats=LaneStats()), None)
    ledger.end(given_up, "cancelled")
    ledger.end(late, "deadline", DeadlineExceeded("too late"))
    ledger.end(waiting, "cancelled")
    assert (errand.prompt_tokens, errand.output_tokens, errand.under_way) == (2, 6, False)


async def test_an_errand_knows_which_of_many_texts_have_been_read(ledger: Ledger, tmp_path: Path) -> None:
    inputs = [EncodeInput(ids=[1] * length) for length in (5, 7, 11)]
    request = EncodeRequest(model="m@1", output="embedding", inputs=inputs)
    flight = encode_flight(request, stub_model("m", tmp_path, "1"), 1)
    flight.errand = errand = Errand()
    ledger.admit(flight)
    read = [EncodeResult(request_id=1, index=index) for index in (0, 2)]
    ledger.take_step(Step(model="m@1", started_ids=[1], encoded=read, stats=LaneStats()), None)
    ledger.end(flight, "cancelled")
    assert (errand.prompt_tokens, errand.output_tokens) == (16, 0)


@pytest.mark.parametrize("per_step", [1, 3])
async def test_results_of_too_many_numbers_end_their_request_at_the_one_that_is_too_much(
    ledger: Ledger, dispatcher: Dispatcher, sent: list[ToWorker], tmp_path: Path, per_step: int
) -> None:
    """They were counted when all were there: one request filled the memory, and was refused then."""
    inputs = [EncodeInput(ids=[1, 2])] * 4
    request = EncodeRequest(model="m@1", output="sparse_embedding", inputs=inputs, max_numbers=9)
    flight = encode_flight(request, stub_model("m", tmp_path, "1"), 1)
    ledger.admit(flight)
    results = [EncodeResult(request_id=1, index=index, shape=[2, 2], data=bytes(16)) for index in range(3)]
    for first in range(0, 3, per_step):
        assert flight.outcome is None
        ledger.take_step(
            Step(model="m@1", started_ids=[1], encoded=results[first : first + per_step], stats=LaneStats()), None
        )
    assert (flight.outcome, flight.num_numbers) == ("error", 12)
    assert isinstance(flight.error, PayloadTooLarge)
    assert sent[-1] == Cancel(1)
    assert (len(ledger), dispatcher.load("").num_requests) == (0, 0)
    late = EncodeResult(request_id=1, index=3, shape=[2, 2], data=bytes(16))
    ledger.take_step(Step(model="m@1", encoded=[late], stats=LaneStats()), None)
    assert flight.results[3] is None


async def test_results_of_just_as_many_numbers_as_there_may_be_are_given(ledger: Ledger, tmp_path: Path) -> None:
    request = EncodeRequest(model="m@1", output="sparse_embedding", inputs=[EncodeInput(ids=[1])] * 2, max_numbers=8)
    flight = encode_flight(request, stub_model("m", tmp_path, "1"), 1)
    ledger.admit(flight)
    results = [EncodeResult(request_id=1, index=index, shape=[2, 2], data=bytes(16)) for index in range(2)]
    ledger.take_step(Step(model="m@1", started_ids=[1], encoded=results, stats=LaneStats()), None)
    assert flight.outcome == "stop"
