"""Single-pass work in the worker: whose fault a failed batch is, and when nothing can be computed any more."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from model.encoder_runner import EncodeItem, Result
from service.engine.batcher import Batcher
from service.engine.protocol import Encode, EncodeInput, Loaded
from service.engine.single_pass_lane import SinglePassLane

BAD = 13


class Runner:
    """Fails with a text that holds `BAD`; from then on with all, if the fault stays."""

    context_length = 512

    def __init__(self, *, stays: bool) -> None:
        self._stays = stays
        self._stuck = False

    def run(self, items: Sequence[EncodeItem]) -> list[Result]:
        self._stuck = self._stays and (self._stuck or any(BAD in item.ids for item in items))
        if self._stuck or any(BAD in item.ids for item in items):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return [np.zeros(2, dtype=np.float32) for _ in items]

    def recover(self) -> None:
        if self._stuck:
            raise RuntimeError("CUDA error: device-side assert triggered")


def make_lane(*, stays: bool) -> SinglePassLane:
    lane = SinglePassLane(
        Loaded(model="m@1", dtype="float32", device="cpu", weight_bytes=1), Batcher(100), cast(Any, Runner(stays=stays))
    )
    for number in range(4):
        ids = [BAD] if number == 2 else [5]
        lane.submit(Encode(request_id=number, model="m@1", output="embedding", inputs=[EncodeInput(ids=ids)]), 0.0)
    return lane


def test_of_a_batch_that_fails_only_the_culprit_does() -> None:
    results = make_lane(stays=False).step(0.0).encoded
    assert {result.request_id for result in results if result.error is not None} == {2}
    assert len(results) == 4


def test_a_fault_that_stays_with_the_device_ends_the_worker_and_fails_nobody() -> None:
    """Each text failed, one after the other and for ever, in a service that said that it was ready."""
    with pytest.raises(RuntimeError, match="assert"):
        make_lane(stays=True).step(0.0)


def test_a_step_is_not_given_the_time_of_all_that_waits() -> None:
    lane = make_lane(stays=False)
    assert lane.next_step_tokens == 4
    inputs = [EncodeInput(ids=[5] * 100)] * 50
    lane.submit(Encode(request_id=9, model="m@1", output="embedding", inputs=inputs), 0.0)
    assert lane.next_step_tokens == Runner.context_length


def test_a_step_is_given_the_time_of_the_largest_that_it_may_be() -> None:
    loaded = Loaded(model="m@1", dtype="float32", device="cpu", weight_bytes=1)
    lane = SinglePassLane(loaded, Batcher(100, max_tokens_alone=800), cast(Any, Runner(stays=False)))
    inputs = [EncodeInput(ids=[5] * 100)] * 50
    lane.submit(Encode(request_id=9, model="m@1", output="embedding", inputs=inputs), 0.0)
    assert lane.next_step_tokens == 800
    assert lane.step(0.0, alone=True).stats.step_tokens == 800
    assert lane.step(0.0).stats.step_tokens == 100
