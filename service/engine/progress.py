"""The progress clock: a shared page by which the supervisor tells a working worker from a stuck one.

The worker writes when its current step began and how long that step may take, and beats between steps; the supervisor
only reads. Two doubles are written without a lock: a torn read costs at most one early look, never a wrong kill,
because the supervisor asks twice. Runs in both processes.
"""

import mmap
import os
import struct
import tempfile

_PAGE = struct.Struct("<ddd")


class ProgressClock:
    """`step_started` is 0.0 between steps; all times are `time.monotonic()` seconds."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, mmap.PAGESIZE)

    @classmethod
    def create(cls) -> "ProgressClock":
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return cls(descriptor)

    def close(self) -> None:
        self._page.close()
        os.close(self.descriptor)

    def beat(self, now: float) -> None:
        """The worker is between steps and alive."""
        _PAGE.pack_into(self._page, 0, now, 0.0, 0.0)

    def begin_step(self, now: float, bound_seconds: float) -> None:
        _PAGE.pack_into(self._page, 0, now, now, bound_seconds)

    def overdue_seconds(self, now: float, idle_bound_seconds: float) -> float:
        """How far past its bound the worker is; 0.0 or less means that it is working or resting as it should."""
        beat: float
        started: float
        bound: float
        beat, started, bound = _PAGE.unpack_from(self._page, 0)
        return now - started - bound if started else now - beat - idle_bound_seconds


class StepBound:
    """How long a step may take, learned from the steps before it.

    Until `WARM_UP_STEPS` steps are known the bound is generous (first steps allocate, compile and page in); after
    that it is `FACTOR` times what the slowest recent rate predicts, and never below the floor.
    """

    WARM_UP_STEPS = 4
    WARM_UP_FACTOR = 6.0
    FACTOR = 20.0
    DECAY = 0.9

    def __init__(self, floor_seconds: float) -> None:
        self._floor = floor_seconds
        self._num_steps = 0
        self._seconds_per_token = 0.0

    def seconds(self, num_tokens: int) -> float:
        if self._num_steps < self.WARM_UP_STEPS:
            return self._floor * self.WARM_UP_FACTOR
        return max(self._floor, self.FACTOR * self._seconds_per_token * num_tokens)

    def record(self, num_tokens: int, seconds: float) -> None:
        self._num_steps += 1
        rate = seconds / max(num_tokens, 1)
        self._seconds_per_token = max(rate, self.DECAY * self._seconds_per_token + (1 - self.DECAY) * rate)
