"""Single-pass work through a real worker: the same vectors whatever happens to it, and its share of the turns."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from service.admission import QueueLimits
from service.app import create_app
from service.engine.accounting import Accounting
from service.engine.client import EngineClient
from service.engine.flight import EncodeRequest, encode_flight
from service.engine.loading import MAX_STEPS_AT_ONCE
from service.engine.protocol import EncodeInput, EncodeResult
from service.errors import DeadlineExceeded, Overloaded, Quarantined
from service.metrics import Metrics
from service.settings import Settings
from tests.service.engine.conftest import ENCODER, ENCODER_KEY, MakeEngine, load_encoder, read_ids, sample, submit
from tests.service.engine.faults.faulty_worker import CRASH, HANG, NOT_A_NUMBER, RAISE
from tests.service.engine.test_engine import PROMPT, check_books, until

pytestmark = pytest.mark.skipif(not ENCODER.is_dir(), reason="needs checkpoints/slimpajama-tiny-encoder")


def texts(count: int, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Random ids above those that the faulty worker looks for."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, 8000) for _ in range(draw.randint(3, longest))] for _ in range(count)]


def request(inputs: Sequence[Sequence[int]], **fields: Any) -> EncodeRequest:
    return EncodeRequest(
        model=ENCODER_KEY, output="embedding", inputs=[EncodeInput(ids=list(ids)) for ids in inputs], **fields
    )


async def vectors(engine: EngineClient, inputs: Sequence[Sequence[int]], **fields: Any) -> NDArray[np.float32]:
    results = await engine.encode(request(inputs, **fields))
    assert [result.error for result in results] == [None] * len(inputs)
    return np.stack([np.frombuffer(result.data, dtype="<f4") for result in results])


class Flood:
    """Clients that ask for embeddings without end."""

    def __init__(self, engine: EngineClient, num_clients: int = 8) -> None:
        self.num_done = 0
        self._engine = engine
        self._tasks = [asyncio.ensure_future(self._client(number)) for number in range(num_clients)]

    async def _client(self, number: int) -> None:
        inputs = texts(2, seed=number)
        while True:
            await self._engine.encode(request(inputs, client=f"flood {number}"))
            self.num_done += 1

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_a_flood_of_embeddings_and_generation_both_get_on(make_engine: MakeEngine) -> None:
    """Whoever serves one queue to its end before it looks at the next never comes back from this one."""
    engine = await make_engine(encoder=True)
    flood = Flood(engine)
    try:
        await until(lambda: flood.num_done > 8)
        for client in ("", "flood 0"):
            done = flood.num_done
            assert len(await read_ids(submit(engine, PROMPT, max_tokens=400, client=client))) == 400
            assert flood.num_done > done
    finally:
        await flood.close()
    check_books(engine)


async def test_embeddings_get_on_beside_generation_without_end(make_engine: MakeEngine) -> None:
    engine = await make_engine(encoder=True, max_sequences=4)
    streams = [submit(engine, PROMPT, max_tokens=450) for _ in range(64)]
    await vectors(engine, texts(256))
    assert any(stream.timings.outcome is None for stream in streams)
    for stream in streams:
        await stream.aclose()
    check_books(engine)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_all_vectors_come_and_are_the_same_when_the_worker_dies_or_hangs(
    make_engine: MakeEngine, number: signal.Signals
) -> None:
    """infinity's futures wait for ever when its worker thread has died, and its health says 200."""
    engine = await make_engine(encoder=True, max_batch_tokens=64, limits={"step_timeout_seconds": 1.0})
    inputs = texts(300)
    expected = await vectors(engine, inputs)
    work = [asyncio.ensure_future(vectors(engine, inputs[start::3])) for start in range(3)]
    least = sample(engine, "slimpajama_step_tokens_sum") + 200
    await until(lambda: sample(engine, "slimpajama_step_tokens_sum") > least)
    assert engine.supervisor.worker_pid is not None
    os.kill(engine.supervisor.worker_pid, number)
    for start, found in enumerate(await asyncio.gather(*work)):
        assert_allclose(found, expected[start::3], atol=1e-6)
    assert sample(engine, "slimpajama_worker_restarts_total") == 1
    assert sample(engine, "slimpajama_requests_replayed_total") > 0
    check_books(engine)


async def test_how_large_a_step_is_stays_known_while_the_worker_is_away(make_engine: MakeEngine) -> None:
    """What came meanwhile was taken for bulk, and waited behind all that was not."""
    engine = await make_engine(encoder=True, max_batch_tokens=64)
    model = next(model for model in engine.models.everything() if "embed" in model.tasks)
    assert model.step_tokens == MAX_STEPS_AT_ONCE * 64
    assert engine.supervisor.worker_pid is not None
    os.kill(engine.supervisor.worker_pid, signal.SIGKILL)
    await until(lambda: model.loaded is None)
    assert model.step_tokens == MAX_STEPS_AT_ONCE * 64


@pytest.mark.parametrize("poison", [CRASH, HANG])
async def test_a_request_that_kills_its_worker_fails_alone(make_engine: MakeEngine, poison: int) -> None:
    limits = {"restart_budget": 20, "step_timeout_seconds": 0.7, "max_backoff_seconds": 0.05}
    engine = await make_engine(encoder=True, faulty=True, limits=limits)
    inputs = texts(24)
    expected = [await vectors(engine, inputs[start::6]) for start in range(6)]
    good = [asyncio.ensure_future(vectors(engine, inputs[start::6])) for start in range(6)]
    with pytest.raises(Quarantined):
        await engine.encode(request([[*inputs[0], poison]]))
    for found, wanted in zip(await asyncio.gather(*good), expected, strict=True):
        assert_allclose(found, wanted, atol=1e-6)
    check_books(engine)


@pytest.mark.parametrize("poison", [RAISE, NOT_A_NUMBER])
async def test_a_poisoned_text_fails_alone_without_a_restart(make_engine: MakeEngine, poison: int) -> None:
    engine = await make_engine(encoder=True, faulty=True)
    inputs = texts(24)
    expected = await vectors(engine, inputs)
    inputs[7] = [*inputs[7], poison]
    results: list[EncodeResult] = await engine.encode(request(inputs))
    assert [index for index, result in enumerate(results) if result.error is not None] == [7]
    for index, result in enumerate(results):
        if index != 7:
            assert_allclose(np.frombuffer(result.data, dtype="<f4"), expected[index], atol=1e-6)
    assert sample(engine, "slimpajama_worker_restarts_total") == 0


async def test_too_large_a_flood_is_refused_with_a_time_and_the_rest_is_served(make_engine: MakeEngine) -> None:
    """text-embeddings-inference panics when its queue is full, and counts a batch of 32 as 32 requests."""
    engine = await make_engine(encoder=True, queue=QueueLimits(8, 100_000), max_batch_tokens=64)
    outcomes = await asyncio.gather(*(vectors(engine, texts(4)) for _ in range(100)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    served = [outcome for outcome in outcomes if isinstance(outcome, np.ndarray)]
    assert len(refused) + len(served) == 100
    assert min(len(refused), len(served)) > 5
    assert all(error.retry_after is not None and error.retry_after >= 1 for error in refused)
    assert len(await vectors(engine, texts(32))) == 32
    check_books(engine)


async def test_a_client_that_leaves_takes_its_texts_out_of_the_worker(make_engine: MakeEngine) -> None:
    """infinity and KServe go on with the work of clients that have left."""
    engine = await make_engine(encoder=True, max_batch_tokens=64)
    leaving = asyncio.ensure_future(vectors(engine, texts(2000)))
    await until(lambda: sample(engine, "slimpajama_step_tokens_sum") > 0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await vectors(engine, texts(1))
    assert engine.num_in_flight == 0
    assert sample(engine, "slimpajama_step_tokens_sum") < sum(len(ids) for ids in texts(2000)) / 2
    check_books(engine)


async def test_a_deadline_ends_texts_that_wait(make_engine: MakeEngine) -> None:
    engine = await make_engine(encoder=True, max_batch_tokens=64)
    busy = asyncio.ensure_future(vectors(engine, texts(1000)))
    with pytest.raises(DeadlineExceeded):
        await vectors(engine, texts(1000, seed=1), deadline=time.monotonic() + 0.05)
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)
    assert len(await vectors(engine, texts(1))) == 1
    check_books(engine)


async def test_the_door_answers_while_the_worker_computes(make_engine: MakeEngine) -> None:
    """KServe runs the network on the event loop, and nothing else until it is through."""
    engine = await make_engine(encoder=True)
    transport = httpx.ASGITransport(app=create_app(Settings(), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        pid = engine.supervisor.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            work = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": "a cat"}))
            await until(lambda: engine.num_in_flight == 1)
            for path in ("/livez", "/readyz", "/v1/models", "/metrics"):
                assert (await client.get(path)).status_code == 200
            assert (await client.post("/v1/tokenize", json={"text": "a cat"})).status_code == 200
            assert not work.done()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await work).status_code == 200
    assert sample(engine, "slimpajama_worker_restarts_total") == 0


def test_each_requests_times_are_its_own() -> None:
    """text-embeddings-inference gives each request of a batch the batch's mean."""
    metrics, model = Metrics(), load_encoder()
    books = Accounting(metrics, QueueLimits(10, 10_000), 0.0)
    for number, accepted in ((1, 10.0), (2, 13.5)):
        flight = encode_flight(request(texts(1)), model, number)
        flight.accepted = accepted
        books.started(flight, 14.0)
        books.finished(flight, "stop", 15.0)
    found = {
        (entry.name, entry.labels.get("le")): entry.value
        for metric in metrics.registry.collect()
        for entry in metric.samples
    }
    assert found["slimpajama_queue_seconds_sum", None] == 4.0 + 0.5
    assert found["slimpajama_request_seconds_sum", None] == 5.0 + 1.5
    assert [found["slimpajama_request_seconds_bucket", le] for le in ("1.0", "2.0", "+Inf")] == [0.0, 1.0, 2.0]


async def test_each_request_is_counted_once_under_its_model_version_and_task(make_engine: MakeEngine) -> None:
    """text-embeddings-inference counts a lone /predict twice and never as a success, and names no model."""
    engine = await make_engine(encoder=True)
    await vectors(engine, texts(3), task="similarity")
    labels = {"model": "encoder", "version": "1", "task": "similarity"}
    found = {
        entry.name: entry.value
        for metric in engine._books.metrics.registry.collect()
        for entry in metric.samples
        if entry.labels == labels or entry.labels == {**labels, "outcome": "stop"}
    }
    assert found["slimpajama_requests_accepted_total"] == 1
    assert found["slimpajama_request_outcomes_total"] == 1
    assert found["slimpajama_prompt_tokens_total"] == sum(len(ids) for ids in texts(3))
    assert found["slimpajama_request_seconds_count"] == 1
