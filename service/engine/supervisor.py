"""Starts the worker process, watches it, and starts it again when it dies or hangs; a restart budget bounds this.

Knows processes and frames, not requests: what a death means for them is the client's to decide, through callbacks.
Runs in the API process, on its event loop.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.engine import protocol
from service.engine.progress import Judge, ProgressClock
from service.engine.protocol import FromWorker, ToWorker, WorkerConfig

log = logging.getLogger("slimpajama.supervisor")

WATCH_SECONDS = 0.1
MAX_PAUSES = 2
"""Between two looks; more than that is the machine's doing and is not held against the worker."""
MIN_IDLE_BOUND_SECONDS = 5.0
SOCKET_BUFFER_BYTES = 1 << 22
MAX_KEPT_KERNELS = "64"
"""PyTorch and oneDNN compile a matrix kernel for each number of rows that comes up and keep 1,024 of them each, half a
MiB apiece: a GiB before memory is flat. Compiling one anew takes less than a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorLimits:
    """At most `restart_budget` restarts within `restart_window_seconds`; steps are bounded from `step_timeout` up."""

    restart_budget: int = 5
    restart_window_seconds: float = 600.0
    step_timeout_seconds: float = 20.0
    first_backoff_seconds: float = 0.05
    max_backoff_seconds: float = 5.0
    settled_seconds: float = 5.0
    """A worker that lived this long starts the back-off anew."""
    stop_grace_seconds: float = 2.0
    start_seconds: float = 120.0
    """A worker that has not got as far as its loop by then hangs."""
    command: tuple[str, ...] = (sys.executable, "-m", "service.engine.worker")
    """The worker's program; the descriptors it inherits are added as arguments."""


class WorkerEvents(Protocol):
    """What the supervisor tells its owner; called on the event loop."""

    def on_message(self, message: FromWorker) -> None: ...

    def on_worker_down(self, cause: str, batch: frozenset[int] | None) -> None:
        """The worker is gone; nothing sent to it before counts any more. `batch`: the requests that it was computing,
        where that is known."""
        ...

    def on_budget_spent(self) -> None:
        """No further worker will be started."""
        ...


class _Worker:
    """One life of the worker process, and the socket to it."""

    def __init__(self, limits: SupervisorLimits, now: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for endpoint in (ours, theirs):
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        ours.setblocking(False)
        self.socket = ours
        self.clock = ProgressClock.create()
        self.clock.begin_step(now, limits.start_seconds)  # until its loop beats, starting is its step
        arguments = ["--socket", str(theirs.fileno()), "--clock", str(self.clock.descriptor)]
        arguments += ["--parent", str(os.getpid()), "--step-timeout", str(limits.step_timeout_seconds)]
        self.process = subprocess.Popen(
            [*limits.command, *arguments],
            pass_fds=(theirs.fileno(), self.clock.descriptor),
            stdin=subprocess.DEVNULL,
            env={
                "ONEDNN_PRIMITIVE_CACHE_CAPACITY": MAX_KEPT_KERNELS,
                "LRU_CACHE_CAPACITY": MAX_KEPT_KERNELS,
                **os.environ,
            },
        )
        theirs.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def reap(self) -> tuple[str, frozenset[int] | None]:
        """Waits for the exit and says how it came about, and in the midst of which requests."""
        code = await asyncio.to_thread(self.process.wait)
        batch = self.clock.batch()
        self.clock.close()
        return signal.Signals(-code).name.lower() if code < 0 else f"exit_{code}", batch


class _Reading(asyncio.Protocol):
    """Passes messages on until the worker's end of the socket closes, which a death of any kind does."""

    def __init__(self, on_message: Callable[[FromWorker], None]) -> None:
        self._on_message = on_message
        self._buffer = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Has the fault of whoever could not take a message."""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            for body in protocol.take_frames(self._buffer):
                if not self.ended.done():
                    self._on_message(protocol.read_from_worker(body))
        except Exception as error:
            self.ended.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if not self.ended.done():
            self.ended.set_result(None)


class Supervisor:
    def __init__(
        self,
        config: Callable[[], WorkerConfig],
        events: WorkerEvents,
        limits: SupervisorLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`config` is asked anew at every start, so that a restarted worker loads what is wanted then."""
        self._config = config
        self._events = events
        self._limits = limits
        self._now = clock
        self._restarts: deque[float] = deque()
        self._worker: _Worker | None = None
        self._link: asyncio.WriteTransport | None = None
        self._runner: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._hung = False

    @property
    def worker_pid(self) -> int | None:
        return self._worker.process.pid if self._worker else None

    def start(self) -> None:
        self._runner = asyncio.get_running_loop().create_task(self._run(), name="supervisor")

    @property
    def alive(self) -> bool:
        """Whether the supervisor itself still does its work (liveness)."""
        return self._runner is not None and not self._runner.done()

    def send(self, message: ToWorker) -> None:
        """Hands a message to the worker; dropped when there is none, or none any more (its successor is told anew)."""
        if self._link is not None and not self._link.is_closing():
            self._link.write(protocol.frame(message))

    async def stop(self) -> None:
        """Ends the worker: asked first, killed after a grace period."""
        self._stop.set()
        if self._worker is not None:
            self.send(protocol.Shutdown())
            try:
                await asyncio.to_thread(self._worker.process.wait, self._limits.stop_grace_seconds)
            except subprocess.TimeoutExpired:
                self._worker.kill()
        if self._runner is not None:
            await self._runner

    async def _run(self) -> None:
        """A fault of our own must not leave the service waiting for a worker that nobody starts."""
        try:
            await self._keep_alive()
        except Exception:
            log.exception("the supervisor failed")
            if self._worker is not None:
                self._worker.kill()
            self._events.on_budget_spent()

    async def _keep_alive(self) -> None:
        attempt = 0
        while not self._stop.is_set():
            started = self._now()
            cause, batch = await self._live_once()
            if self._stop.is_set():
                return
            lived_seconds = self._now() - started
            log.error("worker died", extra={"cause": cause, "lived_seconds": round(lived_seconds, 3)})
            self._events.on_worker_down(cause, batch)
            if not self._take_restart():
                self._events.on_budget_spent()
                return
            attempt = 0 if lived_seconds > self._limits.settled_seconds else attempt + 1
            backoff = min(self._limits.first_backoff_seconds * 2**attempt, self._limits.max_backoff_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), backoff)

    def _take_restart(self) -> bool:
        now = self._now()
        while self._restarts and now - self._restarts[0] > self._limits.restart_window_seconds:
            self._restarts.popleft()
        if len(self._restarts) >= self._limits.restart_budget:
            log.critical("restart budget spent", extra={"restarts": len(self._restarts)})
            return False
        self._restarts.append(now)
        return True

    async def _live_once(self) -> tuple[str, frozenset[int] | None]:
        """One worker from its start to its end; returns the cause of the end, and what it was computing then."""
        worker = self._worker = _Worker(self._limits, self._now())
        self._hung = False
        loop, events = asyncio.get_running_loop(), self._events
        link, reading = await loop.create_unix_connection(lambda: _Reading(events.on_message), sock=worker.socket)
        self._link = link
        self.send(self._config())
        watcher = asyncio.create_task(self._watch(worker), name="worker-watch")
        try:
            await reading.ended
        finally:
            watcher.cancel()
            self._link = None
            link.close()
        worker.kill()
        exit_cause, batch = await worker.reap()
        self._worker = None
        return "hang" if self._hung else exit_cause, batch

    async def _watch(self, worker: _Worker) -> None:
        """Kills a worker that is past the bound of its step, or that has stopped beating between steps."""
        idle_bound = max(self._limits.step_timeout_seconds, MIN_IDLE_BOUND_SECONDS)
        judge = Judge(
            worker.clock, self._now(), idle_bound_seconds=idle_bound, pause_seconds=MAX_PAUSES * WATCH_SECONDS
        )
        suspicious = 0
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            overdue = judge.overdue_seconds(self._now())
            suspicious = suspicious + 1 if overdue > 0 else 0
            if suspicious >= 2:
                log.error("worker hangs", extra={"overdue_seconds": round(overdue, 3)})
                self._hung = True
                worker.kill()
                return
