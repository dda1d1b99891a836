"""The worker process: it owns the device and the weights, and does one thing in a loop.

Drain the inbox, pick the checkpoint whose turn it is, run one step of it, deliver. It knows token ids, not text, HTTP
or Prometheus. One thread owns everything; checkpoints are read and grammars compiled on threads of their own, which
hand over through a queue and a byte in the wake pipe.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch

from model.errors import CheckpointError
from service import logs
from service.engine.adapter_loading import LoadedAdapter, load_adapter
from service.engine.cache_budget import Neighbours
from service.engine.connection import ConnectionLostError, WorkerConnection
from service.engine.generation_lane import GenerationLane
from service.engine.lanes import Lane
from service.engine.loading import load_lane
from service.engine.memory import bound_heaps, free_memory, keep_what_is_here
from service.engine.progress import ProgressClock, StepBound
from service.engine.protocol import (
    Cancel,
    Encode,
    EncodeResult,
    Generate,
    Load,
    LoadFailed,
    Loading,
    ModelSpec,
    Shutdown,
    Step,
    TokenOutput,
    ToWorker,
    Unload,
    Unloaded,
    WorkerConfig,
)
from service.engine.ranks import Ranks, num_threads

log = logging.getLogger("slimpajama.worker")

Arrival = Lane | LoadedAdapter | LoadFailed | Loading
"""What the loader hands over."""

IDLE_WAIT_SECONDS = 0.5
PROGRESS_SECONDS = 0.1
LOAD_SILENCE_SECONDS = 900.0
"""After so long without a sign of it, loading is stuck (a file system or a device that does not answer)."""
PR_SET_PDEATHSIG = 1


class Worker:
    def __init__(self, connection: WorkerConnection, clock: ProgressClock, bound: StepBound, wake: Callable[[], None]):
        self._connection = connection
        self._clock = clock
        self._bound = bound
        self._wake = wake
        self._config: WorkerConfig | None = None
        self._ranks: Ranks | None = None
        self._lanes: dict[str, Lane] = {}
        self._adapters: dict[str, GenerationLane] = {}
        """The lane that each adapter is computed in."""
        self._early: list[LoadedAdapter] = []
        """Here before their bases, which are being loaded."""
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._num_loading = 0
        self._load_heard = 0.0
        self._stopping = False

    @property
    def is_loading(self) -> bool:
        return self._num_loading > 0

    def run(self) -> None:
        while not self._stopping:
            now = time.monotonic()
            self._clock.beat(now)
            self._check_loading(now)
            self._drain_inbox()
            self._step_next()

    def _step_next(self) -> None:
        """A step of the checkpoint whose turn it is. Keeps no hold of it: the inbox may take it away between steps."""
        ready = [lane for lane in self._lanes.values() if lane.has_work]
        if not ready:
            return
        lane = self._next_lane(ready)
        self._clock.begin_step(time.monotonic(), self._bound.seconds(lane.next_step_tokens))
        step = lane.step(time.monotonic(), alone=len(ready) == 1)
        self._bound.record(step.stats.step_tokens, step.stats.step_seconds)
        self._connection.send(step)

    def _next_lane(self, ready: list[Lane]) -> Lane:
        """The one that has used the least time: every checkpoint gets its fair turn."""
        lane = min(ready, key=lambda entry: entry.busy_seconds)
        for other in self._lanes.values():
            if not other.has_work:
                other.busy_seconds = max(other.busy_seconds, lane.busy_seconds)
        return lane

    # -- inbox --------------------------------------------------------------------------------------------------------

    def _drain_inbox(self) -> None:
        idle = not any(lane.has_work for lane in self._lanes.values())
        for message in self._connection.receive(IDLE_WAIT_SECONDS if idle else 0.0):
            self._handle(message)
        with contextlib.suppress(queue.Empty):
            while True:
                self._handle_arrival(self._arrivals.get_nowait())

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Generate() | Encode():
                self._submit(message)
            case Cancel():
                self._cancel(message.request_id)
            case WorkerConfig():
                self._configure(message)
            case Load():
                self._start_loading([message.spec])
            case Unload():
                self._unload(message.model)
            case Shutdown():
                self._stopping = True

    def _submit(self, message: Generate | Encode) -> None:
        lane = self._lanes.get(message.model)
        if lane is None:
            self._refuse(message, f"checkpoint '{message.model}' is not loaded")
            return
        try:
            lane.submit(message, time.monotonic())
        except ValueError as error:
            self._refuse(message, str(error))

    def _cancel(self, request_id: int) -> None:
        """Where no step follows that would tell how things stand now, it is told here: nobody else would."""
        for lane in self._lanes.values():  # all but one have never heard of it
            if lane.cancel(request_id) and not lane.has_work:
                self._connection.send(lane.report())

    def _refuse(self, message: Generate | Encode, reason: str) -> None:
        step = Step(model=message.model)
        if isinstance(message, Generate):
            step.tokens = [TokenOutput(request_id=message.request_id, error=reason, finish_reason="error")]
        else:
            step.encoded = [
                EncodeResult(request_id=message.request_id, index=index, error=reason, reason="error")
                for index in range(len(message.inputs))
            ]
        self._connection.send(step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _configure(self, config: WorkerConfig) -> None:
        self._config = config
        logs.configure(config.log_format, config.log_level)
        if config.num_ranks > 1:
            self._ranks = Ranks(config)
            torch.set_num_threads(num_threads(config))
        elif config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._start_loading(config.models)

    def _start_loading(self, specs: list[ModelSpec]) -> None:
        config = self._config
        assert config is not None, "the configuration is the first message"
        self._num_loading += len(specs)
        self._load_heard = time.monotonic()

        def load() -> None:
            for place, spec in enumerate(specs):
                report, neighbours = self._report_progress(spec.key), Neighbours.of(specs, place)
                try:
                    arrival: Arrival
                    if spec.shares is not None:
                        arrival = load_adapter(spec, config)
                    else:
                        arrival = load_lane(spec, config, report, self._wake, self._ranks, neighbours=neighbours)
                    self._arrivals.put(arrival)
                except CheckpointError as fault:  # whose words say all there is to say: the API process logs them
                    self._arrivals.put(LoadFailed(spec.key, str(fault)))
                except Exception as error:
                    log.exception("loading failed", extra={"model": spec.key})
                    self._arrivals.put(LoadFailed(spec.key, f"{type(error).__name__}: {error}"))
                self._wake()
            free_memory()  # what the weights were made of

        threading.Thread(target=load, name="loader", daemon=True).start()

    def _report_progress(self, key: str) -> Callable[[int, int], None]:
        last = 0.0

        def report(done_bytes: int, total_bytes: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PROGRESS_SECONDS or done_bytes == total_bytes:
                last = now
                self._arrivals.put(Loading(key, done_bytes, total_bytes))
                self._wake()

        return report

    def _check_loading(self, now: float) -> None:
        """The loop turns while another thread loads: only here is it seen that loading does not go on.

        Raises RuntimeError, which ends the worker: the supervisor starts another.
        """
        if self._num_loading > 0 and now - self._load_heard > LOAD_SILENCE_SECONDS:
            raise RuntimeError(f"loading a checkpoint has not gone on for {LOAD_SILENCE_SECONDS:g} seconds")

    def _handle_arrival(self, arrival: Arrival) -> None:
        self._load_heard = time.monotonic()
        if isinstance(arrival, Loading):
            self._connection.send(arrival)
            return
        self._num_loading -= 1
        if isinstance(arrival, LoadFailed):
            self._connection.send(arrival)
        elif isinstance(arrival, LoadedAdapter):
            self._early.append(arrival)
        else:
            arrival.busy_seconds = max((lane.busy_seconds for lane in self._lanes.values()), default=0.0)
            arrival.on_batch = self._clock.note_batch
            self._lanes[arrival.loaded.model] = arrival
            self._connection.send(arrival.loaded)
        early, self._early = self._early, []
        for adapter in early:
            self._take_adapter(adapter)

    def _take_adapter(self, arrival: LoadedAdapter) -> None:
        key = arrival.loaded.model
        lane = self._lanes.get(arrival.base)
        if lane is None and self._num_loading > 0:
            self._early.append(arrival)
            return
        if not isinstance(lane, GenerationLane):
            self._connection.send(LoadFailed(key, f"its base, {arrival.base}, is not loaded"))
            return
        lane.add_adapter(key, arrival.weights)
        self._adapters[key] = lane
        self._connection.send(arrival.loaded_with(lane.loaded))

    def _unload(self, key: str) -> None:
        if (owner := self._adapters.pop(key, None)) is not None:
            self._connection.send(owner.drop_adapter(key))
            log.info("adapter unloaded", extra={"model": key})
        lane = self._lanes.pop(key, None)
        if lane is not None:
            self._adapters = {name: other for name, other in self._adapters.items() if other is not lane}
            self._connection.send(lane.close())
            del lane
            if self._ranks is not None:
                self._ranks.drop(key)
            free_memory()
            torch.cuda.empty_cache()  # nothing where CUDA has not been touched
            log.info("checkpoint unloaded", extra={"model": key})
        self._connection.send(Unloaded(key))


def die_with_parent(parent: int) -> None:
    """No worker outlives the API process, whatever kills that (Linux; elsewhere the closed socket tells it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the API process was gone before the worker had started")


def main() -> None:
    parser = argparse.ArgumentParser(prog="slimpajama-worker", description="Started by `slimpajama serve`.")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--clock", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--step-timeout", type=float, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    bound_heaps()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the API process drains first and then says so
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK)

    def wake() -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(wake_write, b"\0")

    connection = WorkerConnection(socket.socket(fileno=arguments.socket), wake_read)
    worker = Worker(connection, ProgressClock(arguments.clock), StepBound(arguments.step_timeout), wake)
    keep_what_is_here()
    with contextlib.suppress(ConnectionLostError):
        worker.run()
    if worker.is_loading:
        # The loader is inside of torch, where the end of the interpreter would find and abort it.
        logging.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main()
