"""The engine as a whole: exact tokens, whatever happens to the worker in the meantime; every request ends once."""

import asyncio
import contextvars
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from model.ops import library
from service.admission import QueueLimits
from service.engine.client import EngineClient
from service.engine.flight import Errand, errand_context
from service.engine.stream import GenerationStream
from service.errors import DeadlineExceeded, GenerationFailed, Overloaded, Quarantined, Unavailable, WorkerLost
from tests.service.engine.conftest import MakeEngine, read_ids, sample, submit
from tests.service.engine.faults.faulty_worker import CRASH, CRASH_LATE, CROWDED, HANG, NOT_A_NUMBER, RAISE

PROMPT = [1, 403, 407, 261, 378]


async def until(condition: Callable[[], bool]) -> None:
    """Polls; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def check_books(engine: EngineClient) -> None:
    """Accepted = ended, to the unit; requests' lengths add up to the tokens that were counted."""
    assert sample(engine, "slimpajama_requests_accepted_total") == sample(engine, "slimpajama_request_outcomes_total")
    for kind in ("prompt", "generated"):
        counted = sample(engine, f"slimpajama_{kind}_tokens_total")
        assert sample(engine, f"slimpajama_request_{kind}_tokens_sum") == counted


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch_tokens": 7},
        {"prefix_caching": False},
        {"kv_cache_bytes": 40 * 20480},
        {"overlap": "on"},
        {"overlap": "on", "kv_cache_bytes": 40 * 20480},
        {"speculative_tokens": 6},
        {"speculative_tokens": 6, "kv_cache_bytes": 40 * 20480},
    ],
    ids=[
        "defaults",
        "chunks-of-7",
        "no-prefix-cache",
        "must-preempt",
        "ahead",
        "ahead-must-preempt",
        "guessed",
        "guessed-must-preempt",
    ],
)
async def test_greedy_tokens_are_the_references_alone_and_64_at_once_cold_and_warm(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]], config: dict[str, Any]
) -> None:
    engine = await make_engine(**config)
    for case in reference_cases:
        stream = submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"]), logprobs=0)
        ids, logprobs = [], []
        async for output in stream:
            ids += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs]
        assert ids == case["new_ids"]
        assert sum(logprobs) == pytest.approx(case["sum_logprob"], abs=1e-3)
        assert logprobs[:5] == pytest.approx(case["first5_logprobs"], abs=1e-3)
    crowd = reference_cases * 16
    streams = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in crowd]
    results = await asyncio.gather(*(read_ids(stream) for stream in streams))
    assert results == [case["new_ids"] for case in crowd]
    if "kv_cache_bytes" in config:
        assert sample(engine, "slimpajama_preemptions_total") > 0
    check_books(engine)


async def test_a_seeded_request_gives_the_same_tokens_alone_in_a_crowd_after_preemption_and_after_a_death(
    make_engine: MakeEngine,
) -> None:
    roomy = await make_engine(limits={"restart_budget": 9})
    alone = [await read_ids(submit(roomy, PROMPT, temperature=0.9, top_p=0.95, seed=seed)) for seed in range(4)]
    crowd = [submit(roomy, PROMPT, temperature=0.9, top_p=0.95, seed=seed) for seed in range(64)]
    assert [await read_ids(stream) for stream in crowd][:4] == alone
    crowd = [submit(roomy, PROMPT, temperature=0.9, top_p=0.95, seed=seed) for seed in range(64)]
    await crowd[0].__anext__()
    assert roomy.supervisor.worker_pid is not None
    os.kill(roomy.supervisor.worker_pid, signal.SIGKILL)
    results = [await read_ids(stream) for stream in crowd]
    assert results[1:4] == alone[1:]
    assert alone[0][-len(results[0]) :] == results[0]
    assert sample(roomy, "slimpajama_requests_replayed_total") > 0
    tight = await make_engine(kv_cache_bytes=40 * 20480)
    crowd = [submit(tight, PROMPT, temperature=0.9, top_p=0.95, seed=seed) for seed in range(64)]
    assert [await read_ids(stream) for stream in crowd][:4] == alone
    assert sample(tight, "slimpajama_preemptions_total") > 0
    check_books(roomy)


async def test_guessed_tokens_change_no_answer_alone_in_a_crowd_or_after_a_death(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]]
) -> None:
    engine = await make_engine(speculative_tokens=8, limits={"restart_budget": 9})
    repeated = [case["prompt_ids"] + case["new_ids"] + case["prompt_ids"] for case in reference_cases]
    plain = await make_engine()
    expected = [await read_ids(submit(plain, ids, max_tokens=60)) for ids in repeated]
    assert [await read_ids(submit(engine, ids, max_tokens=60)) for ids in repeated] == expected
    drafted, accepted = (sample(engine, f"slimpajama_{kind}_tokens_total") for kind in ("draft", "accepted_draft"))
    assert drafted >= accepted > 20
    streams = [submit(engine, ids, max_tokens=60) for ids in repeated * 4]
    first = await streams[0].__anext__()
    assert engine.supervisor.worker_pid is not None
    os.kill(engine.supervisor.worker_pid, signal.SIGKILL)
    results = [await read_ids(stream) for stream in streams]
    assert [first.token_ids + results[0], *results[1:]] == expected * 4
    assert sample(engine, "slimpajama_requests_replayed_total") > 0
    check_books(engine)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
async def test_every_stream_goes_on_without_a_lost_or_repeated_token_when_the_worker_dies_or_hangs(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]], number: signal.Signals
) -> None:
    engine = await make_engine(limits={"restart_budget": 9, "step_timeout_seconds": 1.0})
    crowd = reference_cases * 8
    streams = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in crowd]
    tasks = [asyncio.ensure_future(read_ids(stream)) for stream in streams]
    for _ in range(2):
        so_far = sample(engine, "slimpajama_generated_tokens_total")
        await until(lambda: sample(engine, "slimpajama_generated_tokens_total") > so_far + 100)  # noqa: B023
        assert engine.supervisor.worker_pid is not None
        os.kill(engine.supervisor.worker_pid, number)
        await until(lambda: engine.state == "restarting")
        await until(lambda: engine.state == "ready")
    assert await asyncio.gather(*tasks) == [case["new_ids"] for case in crowd]
    assert sample(engine, "slimpajama_worker_restarts_total") == 2
    check_books(engine)


@pytest.mark.parametrize("poison", [CRASH, CRASH_LATE, HANG])
async def test_a_request_that_kills_its_worker_fails_alone_and_its_neighbours_do_not_notice(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]], poison: int
) -> None:
    limits = {"restart_budget": 20, "step_timeout_seconds": 0.7, "max_backoff_seconds": 0.05}
    engine = await make_engine(faulty=True, limits=limits)
    for _ in range(5):
        await read_ids(submit(engine, PROMPT, max_tokens=8))  # the bound of a step is learned
    good = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in reference_cases]
    bad = submit(engine, [*PROMPT, poison])
    tasks = [asyncio.ensure_future(read_ids(stream)) for stream in good]
    with pytest.raises(Quarantined):
        await read_ids(bad)
    assert await asyncio.gather(*tasks) == [case["new_ids"] for case in reference_cases]
    check_books(engine)


@pytest.mark.parametrize("poison", [RAISE, NOT_A_NUMBER])
async def test_a_request_whose_step_fails_fails_alone_without_a_restart(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]], poison: int
) -> None:
    engine = await make_engine(faulty=True)
    good = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in reference_cases]
    bad = submit(engine, [*PROMPT, poison])
    tasks = [asyncio.ensure_future(read_ids(stream)) for stream in good]
    with pytest.raises(GenerationFailed):
        await read_ids(bad)
    assert await asyncio.gather(*tasks) == [case["new_ids"] for case in reference_cases]
    assert sample(engine, "slimpajama_worker_restarts_total") == 0
    check_books(engine)


async def test_a_step_too_large_for_memory_fails_nobody_and_steps_are_smaller_from_then_on(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]]
) -> None:
    """Sixty requests decode together until each step fails; apart from each other all have room."""
    engine = await make_engine(faulty=True)
    good = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in reference_cases]
    crowd = [submit(engine, [*PROMPT, CROWDED], max_tokens=60) for _ in range(60)]
    results = await asyncio.gather(*(read_ids(stream) for stream in [*good, *crowd]))
    assert results[: len(good)] == [case["new_ids"] for case in reference_cases]
    assert results[len(good) :] == [results[-1]] * 60
    assert len(results[-1]) == 60
    assert sample(engine, "slimpajama_worker_restarts_total") == 0
    check_books(engine)


async def test_past_the_restart_budget_what_is_left_fails_with_a_retryable_error_and_the_engine_says_so(
    make_engine: MakeEngine,
) -> None:
    engine = await make_engine(limits={"restart_budget": 0})
    stream = submit(engine, PROMPT, max_tokens=400)
    await stream.__anext__()
    assert engine.supervisor.worker_pid is not None
    os.kill(engine.supervisor.worker_pid, signal.SIGKILL)
    with pytest.raises(WorkerLost) as caught:
        await read_ids(stream)
    assert caught.value.status == 503
    assert engine.state == "failed"
    with pytest.raises(Unavailable):
        submit(engine, PROMPT)
    check_books(engine)


async def test_a_request_that_ends_with_its_first_step_is_counted_whole(make_engine: MakeEngine) -> None:
    """It was forgotten before it was told as started: its prompt and its time in the queue were in no metric."""
    engine = await make_engine()
    assert len(await read_ids(submit(engine, PROMPT, max_tokens=1))) == 1
    assert sample(engine, "slimpajama_prompt_tokens_total") == len(PROMPT)
    assert sample(engine, "slimpajama_queue_seconds_count") == 1
    assert sample(engine, "slimpajama_request_prompt_tokens_sum") == len(PROMPT)
    assert sample(engine, "slimpajama_request_generated_tokens_sum") == 1
    check_books(engine)


async def test_a_client_that_leaves_frees_its_blocks_within_a_step(make_engine: MakeEngine) -> None:
    engine = await make_engine(prefix_caching=False)
    stream = submit(engine, PROMPT, max_tokens=400)
    await stream.__anext__()
    assert sample(engine, "slimpajama_kv_cache_usage") > 0
    assert sample(engine, "slimpajama_kv_cache_blocks") > 0
    assert sample(engine, "slimpajama_kv_cache_block_tokens") == 16
    await stream.aclose()
    assert await read_ids(submit(engine, PROMPT, max_tokens=1))  # the step after the cancellation
    assert sample(engine, "slimpajama_kv_cache_usage") == 0
    assert engine.num_in_flight == 0
    check_books(engine)


async def test_a_deadline_ends_a_request_wherever_it_is(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_sequences=1)
    running = submit(engine, PROMPT, max_tokens=400, deadline=time.monotonic() + 0.2)
    waiting = submit(engine, PROMPT, max_tokens=400, deadline=time.monotonic() + 0.1)
    for stream in (running, waiting):
        with pytest.raises(DeadlineExceeded):
            await read_ids(stream)
    with pytest.raises(DeadlineExceeded):
        submit(engine, PROMPT, deadline=time.monotonic() - 1)
    assert await read_ids(submit(engine, PROMPT, max_tokens=2))
    check_books(engine)


async def test_a_full_queue_refuses_with_the_time_after_which_to_come_back(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_sequences=1, queue=QueueLimits(2, 10_000))
    streams = await fill_queue(engine)
    with pytest.raises(Overloaded) as caught:
        submit(engine, PROMPT, max_tokens=8)
    assert caught.value.status == 429
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1
    assert all([await read_ids(stream) for stream in streams])
    check_books(engine)


@pytest.mark.parametrize("bound", [0, 4])
async def test_exactly_as_many_wait_as_the_bound_says_and_the_batch_is_filled_beside_them(
    make_engine: MakeEngine, bound: int
) -> None:
    """Eight more waited in the worker, which nobody counted; and a bound of 0 could not be asked for."""
    engine = await make_engine(max_sequences=2, queue=QueueLimits(bound, 10_000))
    for _ in range(3):
        streams = await fill_queue(engine)
        assert len(streams) == 2 + bound
        assert all([len(await read_ids(stream)) == 8 for stream in streams])
    check_books(engine)


async def test_a_full_queue_does_not_stop_a_request_between_two_calls(make_engine: MakeEngine) -> None:
    """The second piece of a long text was refused as if it were a new request, in the midst of a stream."""
    engine = await make_engine(max_sequences=1, queue=QueueLimits(2, 10_000))
    errand = errand_context.set(Errand())
    await read_ids(submit(engine, PROMPT, max_tokens=4))
    streams = await asyncio.create_task(fill_queue(engine), context=contextvars.Context())
    next_call = submit(engine, PROMPT, max_tokens=4)
    errand_context.reset(errand)
    assert len(await read_ids(next_call)) == 4
    assert all([await read_ids(stream) for stream in streams])
    check_books(engine)


async def fill_queue(engine: EngineClient) -> list[GenerationStream]:
    streams: list[GenerationStream] = []
    with suppress(Overloaded):
        while True:
            streams.append(submit(engine, PROMPT, max_tokens=8))
    return streams


async def test_draining_finishes_what_was_accepted_and_takes_nothing_new(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    tasks = [asyncio.ensure_future(read_ids(submit(engine, PROMPT, max_tokens=100))) for _ in range(8)]
    await asyncio.sleep(0)
    drained = asyncio.ensure_future(engine.drain(30))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        submit(engine, PROMPT)
    await drained
    assert all(len(task.result()) == 100 for task in await wait_all(tasks))
    check_books(engine)


async def wait_all(tasks: list["asyncio.Future[list[int]]"]) -> list["asyncio.Future[list[int]]"]:
    await asyncio.gather(*tasks)
    return tasks


async def test_a_drain_that_takes_too_long_ends_with_an_error_and_not_with_silence(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    stream = submit(engine, PROMPT, max_tokens=450)
    await engine.drain(0.01)
    with pytest.raises(Unavailable):
        await read_ids(stream)
    check_books(engine)


async def test_the_worker_does_not_outlive_the_engine(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    pid = engine.supervisor.worker_pid
    assert pid is not None
    await engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_deterministic_answers_are_the_same_to_the_bit_alone_in_a_crowd_and_in_any_chunks(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]]
) -> None:
    """Tokens and log-probabilities; without the option only numerically near ties may differ."""

    async def answer(engine: EngineClient, case: dict[str, Any], seed: int) -> list[tuple[int, float]]:
        stream = submit(engine, case["prompt_ids"] * 3, max_tokens=40, logprobs=0, temperature=0.8, seed=seed)
        return [(entry.token_id, entry.logprob) async for output in stream for entry in output.logprobs]

    if not library.LOADED:
        pytest.skip("the operators were not compiled (no C++ compiler?)")
    whole = await make_engine(dtype="bfloat16", deterministic=True, prefix_caching=False)
    alone = [await answer(whole, case, seed) for seed, case in enumerate(reference_cases)]
    crowd = await asyncio.gather(*(answer(whole, reference_cases[n % 4], n % 4) for n in range(64)))
    assert crowd == alone * 16
    for limits in ({"max_batch_tokens": 7}, {"max_step_stretch": 1.0}, {"speculative_tokens": 8}):
        chunked = await make_engine(dtype="bfloat16", deterministic=True, **limits)
        crowd = await asyncio.gather(*(answer(chunked, reference_cases[n % 4], n % 4) for n in range(16)))
        assert crowd == alone * 4
