"""Workers that do not even begin, and loading that fails in ways that nobody foresaw."""

import asyncio
import socket
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from model.batch import SamplingParams
from service.admission import QueueLimits
from service.engine.accounting import Accounting
from service.engine.client import EngineClient
from service.engine.flight import GenerateRequest
from service.engine.models import ModelDirectory
from service.engine.protocol import Shutdown, Unload, WorkerConfig, frame, read_to_worker, take_frames
from service.engine.supervisor import Supervisor, SupervisorLimits
from service.errors import WorkerLost
from service.metrics import Metrics
from tests.service.engine.conftest import sample
from tests.service.engine.faults.scripted import SLEEPY_WORKER, scripted_engine, write_checkpoint


@pytest.mark.slow
async def test_a_worker_that_hangs_before_it_gets_to_its_loop_is_replaced(tmp_path: Path) -> None:
    command = (sys.executable, str(SLEEPY_WORKER), str(tmp_path / "been-here"))
    async with scripted_engine(write_checkpoint(tmp_path, 11), command=command, start_seconds=5.0) as engine:
        assert engine.state == "ready"
        assert sample(engine, "slimpajama_worker_restarts_total") >= 1


async def test_a_fault_while_checkpoints_are_read_is_told_and_ends_the_engine() -> None:
    def load_directory() -> ModelDirectory:
        raise ZeroDivisionError("of our own making")

    books = Accounting(Metrics(), QueueLimits(10, 1000), time.monotonic())
    engine = EngineClient(load_directory, WorkerConfig(models=[]), SupervisorLimits(), books)
    await engine.start()
    with pytest.raises(WorkerLost, match="of our own making"):
        await engine.wait_ready()
    assert (engine.state, engine.alive) == ("failed", False)
    await engine.stop()


def test_what_is_sent_between_a_worker_s_death_and_the_news_of_it_is_dropped_and_nobody_fails_for_it() -> None:
    """uvloop raises where asyncio only warns: a request that was accepted in that moment was answered with a 500, and
    ran on without anybody to read it."""

    async def send_to_the_dead() -> None:
        supervisor = Supervisor(lambda: WorkerConfig(models=[]), cast(Any, None), SupervisorLimits())
        ours, theirs = socket.socketpair()
        link, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
        supervisor._link = link
        theirs.close()
        for _ in range(10):
            supervisor.send(Shutdown())
            await asyncio.sleep(0)
        assert link.is_closing()

    uvloop.run(send_to_the_dead())


async def test_a_fault_of_our_own_while_a_message_is_taken_ends_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would read the worker's messages any more: it must not look as if all were well."""
    async with scripted_engine(write_checkpoint(tmp_path, 11)) as engine:
        monkeypatch.setattr(engine._ledger, "take_step", lambda *_: 1 / 0)
        request = GenerateRequest(model="m@1", prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=1))
        with pytest.raises(WorkerLost, match="the worker is gone"):
            async for _ in engine.generate(request):
                pass
        assert (engine.state, engine.alive) == ("failed", False)


def test_frames_come_whole_however_the_socket_cuts_them() -> None:
    messages = [Unload(f"model-{number}") for number in range(3)]
    sent, buffer, found = b"".join(map(frame, messages)), bytearray(), []
    for begin in range(0, len(sent), 7):
        buffer += sent[begin : begin + 7]
        found += [read_to_worker(body) for body in take_frames(buffer)]
    assert (found, buffer) == (messages, b"")
