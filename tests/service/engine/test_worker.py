"""The worker's loop without its process: what it holds of an unloaded checkpoint, and loading that does not go on."""

import os
import socket
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from model.batch import SamplingParams
from model.encode_network import EncodeNetwork
from service.engine.loading import MAX_STEPS_AT_ONCE, load_lane, step_tokens_alone
from service.engine.progress import ProgressClock, StepBound
from service.engine.protocol import (
    Cancel,
    Encode,
    EncodeInput,
    FromWorker,
    Generate,
    LoadFailed,
    Loading,
    ModelSpec,
    Shutdown,
    Step,
    ToWorker,
    Unload,
    Unloaded,
    WorkerConfig,
    frame,
)
from service.engine.worker import LOAD_SILENCE_SECONDS, Worker
from tests.service.engine.conftest import KEY, STORIES

SHIPPED = Path(__file__).parents[3] / "checkpoints"


class Connection:
    """Both ends at once: what the worker is told next, and what it has said."""

    def __init__(self) -> None:
        self.inbox: list[ToWorker] = []
        self.said: list[FromWorker] = []

    def receive(self, wait_seconds: float) -> list[ToWorker]:
        taken, self.inbox = self.inbox, []
        return taken

    def send(self, message: FromWorker) -> None:
        self.said.append(message)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K checkpoint is not in ../shared/data")
def test_an_unloaded_checkpoint_leaves_no_weights_no_blocks_and_a_word_to_each_request() -> None:
    connection = Connection()
    worker = Worker(cast(Any, connection), ProgressClock.create(), StepBound(60.0), lambda: None)
    spec = ModelSpec(key=KEY, folder=str(STORIES), dtype="float32", kv_cache_bytes=8 << 20)
    lane = load_lane(spec, WorkerConfig(models=[]), lambda *_: None, lambda: None)
    lane_ref, cache_ref = weakref.ref(lane), weakref.ref(cast(Any, lane)._runner)
    worker._handle_arrival(lane)
    del lane
    sampling = SamplingParams(max_tokens=50, temperature=0.0)
    request = Generate(request_id=7, model=KEY, prompt_ids=[1, 403], sampling=sampling, arrival=time.monotonic())
    connection.inbox = [request, Cancel(1234)]
    for _ in range(3):
        worker._drain_inbox()
        worker._step_next()
    assert lane_ref() is not None
    connection.inbox = [Unload(KEY)]
    worker._drain_inbox()
    assert lane_ref() is None
    assert cache_ref() is None
    *_, last, unloaded = connection.said
    assert isinstance(last, Step)
    assert [(output.request_id, output.finish_reason) for output in last.tokens] == [(7, "error")]
    assert isinstance(unloaded, Unloaded)


def test_a_worker_that_is_told_to_end_while_it_loads_ends_in_order() -> None:
    """Several: the loader is mostly, but not always, where the end of the interpreter would abort the process."""
    spec = ModelSpec(key="m@1", folder=str(SHIPPED / "slimpajama-tiny-encoder"))
    workers = []
    for _ in range(4):
        ours, theirs = socket.socketpair()
        clock = ProgressClock.create()
        command = [sys.executable, "-m", "service.engine.worker", "--socket", str(theirs.fileno())]
        command += ["--clock", str(clock.descriptor), "--parent", str(os.getpid()), "--step-timeout", "60"]
        fds = (theirs.fileno(), clock.descriptor)
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE, text=True)
        theirs.close()
        ours.sendall(frame(WorkerConfig(models=[spec], log_level="warning")))
        workers.append((process, ours))
    for process, ours in workers:
        assert ours.recv(1)  # of what it says of its loading
        ours.sendall(frame(Shutdown()))
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
        ours.close()


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K checkpoint is not in ../shared/data")
def test_a_decoder_s_steps_on_a_cpu_are_sized_by_their_time() -> None:
    spec = ModelSpec(key=KEY, folder=str(STORIES), dtype="float32", kv_cache_bytes=8 << 20)
    lane = load_lane(spec, WorkerConfig(models=[], device="cpu", max_step_stretch=2.0), lambda *_: None, lambda: None)
    assert cast(Any, lane)._scheduler._planner._max_step_stretch == 2.0


def test_a_small_encoder_takes_more_a_step_while_nobody_else_has_work() -> None:
    connection = Connection()
    worker = Worker(cast(Any, connection), ProgressClock.create(), StepBound(60.0), lambda: None)
    config = WorkerConfig(models=[], device="cpu", max_batch_tokens=512)
    for name in ("lm", "encoder"):
        spec = ModelSpec(key=name, folder=str(SHIPPED / f"slimpajama-tiny-{name}"), kv_cache_bytes=8 << 20)
        worker._handle_arrival(load_lane(spec, config, lambda *_: None, lambda: None))
    inputs = [EncodeInput(ids=[5] * 100)] * 30
    sampling = SamplingParams(max_tokens=100, min_tokens=100, temperature=0.0)

    def steps(*messages: ToWorker) -> list[int]:
        connection.inbox, connection.said = list(messages), []
        for lane in worker._lanes.values():
            lane.busy_seconds = 0.0
        worker._drain_inbox()
        while any(lane.has_work for lane in worker._lanes.values()):
            worker._step_next()
        return [
            said.stats.step_tokens for said in connection.said if isinstance(said, Step) and said.model == "encoder"
        ]

    encode = partial(Encode, model="encoder", output="embedding", inputs=inputs)
    assert steps(encode(request_id=1)) == [3000]
    generate = Generate(request_id=2, model="lm", prompt_ids=[1, 403], sampling=sampling, arrival=time.monotonic())
    assert steps(encode(request_id=3), generate)[0] == 500
    loaded = worker._lanes["encoder"].loaded
    assert loaded.max_step_tokens == MAX_STEPS_AT_ONCE * 512


@pytest.mark.parametrize(
    ("device", "num_layer_weights", "max_batch_tokens", "expected"),
    [
        ("cpu", 10_616_832, 512, 4096),  # all-MiniLM-L6
        ("cpu", 84_934_656, 512, 512),  # BERT's base size
        ("cpu", 302_000_000, 512, 512),
        ("cpu", 10_616_832, 64, 512),
        ("cpu", 10_616_832, 8192, 8192),
        ("cuda", 10_616_832, 8192, 8192),
    ],
)
def test_a_step_of_a_small_encoder_costs_no_more_than_one_of_bert_s_size(
    device: str, num_layer_weights: int, max_batch_tokens: int, expected: int
) -> None:
    encoder = cast(EncodeNetwork, SimpleNamespace(num_layer_weights=num_layer_weights))
    assert step_tokens_alone(max_batch_tokens, encoder, torch.device(device)) == expected


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K checkpoint is not in ../shared/data")
def test_a_cancelled_request_that_was_the_last_leaves_no_gauge_behind() -> None:
    """No step follows that would say so: `requests_running` and `kv_cache_usage` stood until the next request."""
    connection = Connection()
    worker = Worker(cast(Any, connection), ProgressClock.create(), StepBound(60.0), lambda: None)
    spec = ModelSpec(key=KEY, folder=str(STORIES), dtype="float32", kv_cache_bytes=8 << 20)
    worker._handle_arrival(load_lane(spec, WorkerConfig(models=[]), lambda *_: None, lambda: None))
    sampling = SamplingParams(max_tokens=50, temperature=0.0)
    request = Generate(request_id=7, model=KEY, prompt_ids=[1, 403], sampling=sampling, arrival=time.monotonic())
    connection.inbox = [request]
    worker._drain_inbox()
    worker._step_next()
    running = connection.said[-1]
    assert isinstance(running, Step)
    assert (running.stats.num_running, running.stats.kv_cache_usage > 0) == (1, True)
    assert worker._clock.batch() == {7}
    connection.inbox = [Cancel(7)]
    worker._drain_inbox()
    idle = connection.said[-1]
    assert isinstance(idle, Step)
    assert (idle.stats.num_running, idle.stats.num_waiting, idle.stats.kv_cache_usage) == (0, 0, 0.0)
    told = len(connection.said)
    connection.inbox = [Cancel(7)]
    worker._drain_inbox()
    assert len(connection.said) == told


def test_loading_that_does_not_go_on_ends_the_worker_and_any_sign_of_it_puts_that_off() -> None:
    worker = Worker(cast(Any, Connection()), ProgressClock.create(), StepBound(60.0), lambda: None)
    began = time.monotonic()
    worker._check_loading(began + 2 * LOAD_SILENCE_SECONDS)  # nothing is being loaded
    worker._config = WorkerConfig(models=[])
    worker._start_loading([ModelSpec(key=KEY, folder="nowhere")])
    worker._check_loading(began + LOAD_SILENCE_SECONDS / 2)
    worker._load_heard = began
    with pytest.raises(RuntimeError, match="900 seconds"):
        worker._check_loading(began + LOAD_SILENCE_SECONDS + 1)
    worker._handle_arrival(Loading(KEY, 1, 2))
    worker._check_loading(time.monotonic() + LOAD_SILENCE_SECONDS - 1)
    worker._handle_arrival(LoadFailed(KEY, "there is no such folder"))
    worker._check_loading(began + 2 * LOAD_SILENCE_SECONDS)


@pytest.mark.parametrize(
    ("folder", "device", "words"),
    [("nowhere", "cpu", "nowhere"), (str(STORIES), "cuda:99", "cuda:99; torch")],
)
def test_why_a_checkpoint_does_not_load_is_told_in_words_and_not_as_a_traceback(
    folder: str, device: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(cast(Any, Connection()), ProgressClock.create(), StepBound(60.0), lambda: None)
    spec = ModelSpec(key=KEY, folder=folder)
    worker._config = WorkerConfig(models=[], device=device)
    worker._start_loading([spec])
    failed = worker._arrivals.get(timeout=60)
    assert isinstance(failed, LoadFailed)
    assert words in failed.message
    assert "Error" not in failed.message
    assert caplog.text == ""
