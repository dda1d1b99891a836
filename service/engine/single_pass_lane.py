"""A checkpoint of single-pass work in the worker: batcher over encoder runner, faults contained.

Knows messages and items; not weights, and not what a vector or a score means. Worker process, main thread.
"""

import logging
import time
from collections.abc import Callable, Collection

import numpy as np

from model.encoder_runner import EncodeItem, EncoderRunner
from service.engine.batcher import Batcher, Item
from service.engine.protocol import Encode, EncodeResult, Generate, LaneStats, Loaded, Step

log = logging.getLogger("slimpajama.worker")


class SinglePassLane:
    """Implements `Lane`."""

    def __init__(self, loaded: Loaded, batcher: Batcher, runner: EncoderRunner) -> None:
        self.loaded = loaded
        self.busy_seconds = 0.0
        self.on_batch: Callable[[Collection[int]], None] = lambda _ids: None
        self._batcher = batcher
        self._runner = runner
        self._unstarted: set[int] = set()

    @property
    def has_work(self) -> bool:
        return self._batcher.num_waiting > 0

    @property
    def next_step_tokens(self) -> int:
        return min(self._batcher.num_waiting_tokens, max(self._batcher.max_tokens_alone, self._runner.context_length))

    def submit(self, message: Generate | Encode, now: float) -> None:  # noqa: ARG002
        if isinstance(message, Generate):
            raise ValueError(f"checkpoint '{message.model}' does not generate")
        self._batcher.add(message)
        self._unstarted.add(message.request_id)

    def cancel(self, request_id: int) -> bool:
        cancelled = self._batcher.cancel(request_id)
        self._unstarted.discard(request_id)
        return bool(cancelled)

    def step(self, now: float, *, alone: bool = False) -> Step:
        results = self._batcher.expire(now)
        batch = self._batcher.next_batch(alone=alone)
        numbers = {item.request_id for item in batch}
        self.on_batch(numbers)
        began = time.monotonic()
        results += self._run(batch)
        forward_seconds = time.monotonic() - began
        started = sorted(numbers & self._unstarted)
        self._unstarted -= numbers
        seconds = time.monotonic() - now
        self.busy_seconds += seconds
        stats = LaneStats(
            num_waiting=len(self._unstarted),
            num_running=len(numbers),
            step_tokens=sum(item.length for item in batch),
            step_sequences=len(batch),
            step_seconds=seconds,
            forward_seconds=forward_seconds,
        )
        if not self._batcher.num_waiting:
            stats.num_running = 0
        return Step(model=self.loaded.model, started_ids=started, encoded=results, stats=stats)

    def report(self) -> Step:
        return Step(model=self.loaded.model)  # asked between steps, when nothing is running

    def close(self) -> Step:
        message = "the checkpoint was unloaded"
        results = [
            EncodeResult(request_id=result.request_id, index=result.index, error=message, reason="error")
            for number in self._batcher.request_ids
            for result in self._batcher.cancel(number)
        ]
        return Step(model=self.loaded.model, encoded=results)

    def _run(self, batch: list[Item]) -> list[EncodeResult]:
        """A batch that raises as a whole is run again half by half, so that only the culprit fails. Raises where the
        device cannot go on: then the process must end.
        """
        try:
            found = self._runner.run([_item(entry) for entry in batch])
        except Exception as error:
            log.exception("batch failed", extra={"model": self.loaded.model, "items": len(batch)})
            self._runner.recover()
            if len(batch) > 1:
                middle = len(batch) // 2
                return self._run(batch[:middle]) + self._run(batch[middle:])
            found = [f"{type(error).__name__} in the forward pass"]
        return [_result(entry, value) for entry, value in zip(batch, found, strict=True)]


def _item(entry: Item) -> EncodeItem:
    return EncodeItem(
        ids=entry.input.ids,
        type_ids=entry.input.type_ids,
        output=entry.output,
        head=entry.head,
        skip_pooling=entry.input.skip_pooling,
    )


def _result(entry: Item, value: np.ndarray | str) -> EncodeResult:
    if isinstance(value, str):
        return EncodeResult(request_id=entry.request_id, index=entry.index, error=value, reason="error")
    data = np.ascontiguousarray(value, dtype="<f4")
    return EncodeResult(request_id=entry.request_id, index=entry.index, shape=list(data.shape), data=data.tobytes())
