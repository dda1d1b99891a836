"""The progress clock: a shared page by which the supervisor tells a working worker from a stuck one.

The worker writes when its current step began, how long that step may take and whose requests are in it, and beats
between steps; the supervisor only reads. Times are written without a lock: a torn read costs at most one early look,
never a wrong kill, because the supervisor asks twice. Runs in both processes.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Collection

_PAGE = struct.Struct("<dddq")
_ID_BYTES = 8
MAX_NOTED = 8192
_SIZE_BYTES = _PAGE.size + MAX_NOTED * _ID_BYTES
_NOT_NOTED = -1


class ProgressClock:
    """`step_started` is 0.0 between steps; all times are `time.monotonic()` seconds."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, _SIZE_BYTES)

    @classmethod
    def create(cls) -> "ProgressClock":
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, _SIZE_BYTES)
        return cls(descriptor)

    def close(self) -> None:
        self._page.close()
        os.close(self.descriptor)

    def beat(self, now: float) -> None:
        """The worker is between steps and alive."""
        _PAGE.pack_into(self._page, 0, now, 0.0, 0.0, _NOT_NOTED)

    def begin_step(self, now: float, bound_seconds: float) -> None:
        _PAGE.pack_into(self._page, 0, now, now, bound_seconds, _NOT_NOTED)

    def note_batch(self, request_ids: Collection[int]) -> None:
        """Whose requests the step that has begun computes; forgotten when it ends."""
        if len(request_ids) <= MAX_NOTED:
            struct.pack_into(f"<{len(request_ids)}q", self._page, _PAGE.size, *request_ids)
            struct.pack_into("<q", self._page, _PAGE.size - _ID_BYTES, len(request_ids))

    def batch(self) -> frozenset[int] | None:
        """Whose requests are in the step; None if that is not known, or if there is no step."""
        num_noted = struct.unpack_from("<q", self._page, _PAGE.size - _ID_BYTES)[0]
        if num_noted == _NOT_NOTED:
            return None
        return frozenset(struct.unpack_from(f"<{num_noted}q", self._page, _PAGE.size))

    @property
    def last_sign(self) -> float:
        """When the worker last wrote a time."""
        return float(_PAGE.unpack_from(self._page, 0)[0])

    def overdue_seconds(self, now: float, idle_bound_seconds: float) -> float:
        """How far past its bound the worker is; 0.0 or less means that it is working or resting as it should."""
        beat: float
        started: float
        bound: float
        beat, started, bound, _ = _PAGE.unpack_from(self._page, 0)
        return now - started - bound if started else now - beat - idle_bound_seconds


class Judge:
    """Says whether a worker hangs, by the time that the judge itself has been awake.

    On a machine that was stopped, or that has no time for the judge, the worker has stood still as well: what lies
    between two looks counts up to `pause_seconds`, and no more.
    """

    def __init__(self, clock: ProgressClock, now: float, *, idle_bound_seconds: float, pause_seconds: float) -> None:
        self._clock = clock
        self._idle_bound_seconds = idle_bound_seconds
        self._pause_seconds = pause_seconds
        self._looked = now
        self._sign = clock.last_sign
        self._missed_seconds = 0.0
        """For how long nobody looked since the worker's last sign."""

    def overdue_seconds(self, now: float) -> float:
        """To be asked again and again."""
        sign = self._clock.last_sign
        if sign != self._sign:
            self._sign, self._missed_seconds = sign, 0.0
        self._missed_seconds += max(0.0, now - max(self._looked, sign) - self._pause_seconds)
        self._looked = now
        return self._clock.overdue_seconds(now, self._idle_bound_seconds) - self._missed_seconds


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
