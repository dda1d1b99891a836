"""A worker of two ranks, as real processes: the same tokens as one, and any rank's death is the worker's."""

import asyncio
import signal
import sys
from typing import Any

import psutil
import pytest

from service.engine.client import EngineClient
from service.errors import WorkerLost
from tests.service.engine.conftest import MakeEngine, read_ids, sample, submit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks are told over Unix sockets")


def other_ranks(engine: EngineClient) -> list[psutil.Process]:
    worker = psutil.Process(engine.supervisor.worker_pid)
    return [child for child in worker.children() if "service.engine.rank" in child.cmdline()]


async def test_two_ranks_give_the_tokens_of_one_and_of_the_reference(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]]
) -> None:
    engine = await make_engine(num_ranks=2)
    assert len(other_ranks(engine)) == 1
    crowd = reference_cases * 4
    streams = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in crowd]
    assert await asyncio.gather(*(read_ids(stream) for stream in streams)) == [case["new_ids"] for case in crowd]
    assert max(len(case["new_ids"]) for case in crowd) >= 64
    (rank,) = other_ranks(engine)
    await engine.stop()
    psutil.wait_procs([rank], timeout=10)
    assert not rank.is_running()


async def test_a_rank_that_is_killed_under_load_costs_a_restart_and_no_request(
    make_engine: MakeEngine, reference_cases: list[dict[str, Any]]
) -> None:
    engine = await make_engine(num_ranks=2, limits={"restart_budget": 9})
    crowd = reference_cases * 4
    streams = [submit(engine, case["prompt_ids"], max_tokens=len(case["new_ids"])) for case in crowd]
    first = await streams[0].__anext__()
    (rank,) = other_ranks(engine)
    rank.send_signal(signal.SIGKILL)
    results = await asyncio.gather(*(read_ids(stream) for stream in streams))
    results[0] = [*first.token_ids, *results[0]]
    assert results == [case["new_ids"] for case in crowd]
    assert sample(engine, "slimpajama_worker_restarts_total") == 1
    assert sample(engine, "slimpajama_requests_replayed_total") > 0
    assert len(other_ranks(engine)) == 1


async def test_heads_that_cannot_be_divided_are_a_fault_of_the_checkpoint_that_says_so(make_engine: MakeEngine) -> None:
    with pytest.raises(WorkerLost, match="cannot be divided over 3 ranks"):
        await make_engine(num_ranks=3)
