"""The real worker, with faults that a test asks for by a token id in the prompt. Started by the tests' supervisor."""

import os
import sys
import time
from collections.abc import Sequence

import torch

from model.batch import Batch, Row, RowOutput, StepOutput
from model.encoder_runner import EncodeItem, EncoderRunner, Result
from model.runner import LaunchedStep, Runner
from service.engine import worker

CRASH, HANG, RAISE, NOT_A_NUMBER, CRASH_LATE, CROWDED = 200, 201, 202, 203, 204, 205
"""Ids of bytes that no prompt of these tests holds."""
ROOM = 40
"""So many tokens of crowded requests find memory in one step."""

_launch, _collect, _encode = Runner.launch, Runner.collect, EncoderRunner.run


def _has(row: Row, token_id: int) -> bool:
    return token_id in row.prompt_ids


def faulty_launch(self: Runner, batch: Batch) -> LaunchedStep:
    for row in batch.rows:
        if _has(row, CRASH) or (_has(row, CRASH_LATE) and len(row.output_ids) >= 3):
            os._exit(3)
        if _has(row, HANG):
            time.sleep(600)
        if _has(row, RAISE):
            raise MemoryError("no room for this one")
    if sum(len(row.token_ids) for row in batch.rows if _has(row, CROWDED)) > ROOM:
        raise torch.OutOfMemoryError("no room for so many")
    return _launch(self, batch)


def faulty_collect(self: Runner, step: LaunchedStep) -> StepOutput:
    output = _collect(self, step)
    for index, row in enumerate(step.rows):
        if _has(row, NOT_A_NUMBER):
            output.rows[index] = RowOutput(row.sequence_id, error="the logits are not finite")
    return output


def faulty_encode(self: EncoderRunner, items: Sequence[EncodeItem]) -> list[Result]:
    for item in items:
        if CRASH in item.ids:
            os._exit(3)
        if HANG in item.ids:
            time.sleep(600)
        if RAISE in item.ids:
            raise MemoryError("no room for this one")
    results = _encode(self, items)
    return [
        "the output is not finite" if NOT_A_NUMBER in item.ids else result
        for item, result in zip(items, results, strict=True)
    ]


if __name__ == "__main__":
    Runner.launch, Runner.collect = faulty_launch, faulty_collect  # type: ignore[method-assign]
    EncoderRunner.run = faulty_encode  # type: ignore[assignment,method-assign]
    sys.exit(worker.main())
