"""The chaos runs' laws at a size that takes seconds. What is judged by time is left to `make chaos`."""

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.chaos.drains import drains
from tests.chaos.fuzz import fuzz
from tests.chaos.kills import kills
from tests.chaos.law import Row
from tests.chaos.run import BEGIN, END, HEAD, with_rows
from tests.chaos.service import LANGUAGE_MODEL
from tests.chaos.swaps import other_version

OF_TIME_AND_SIZE = ("memory", "readiness was told")
"""Faults that a crowded machine, or one that has only just warmed up, has too."""


@pytest.mark.slow
@pytest.mark.parametrize(("law", "count"), [(kills, 2), (drains, 1), (fuzz, 960)])
async def test_law_holds_in_the_small(
    law: Callable[[argparse.Namespace, Path], Awaitable[Row]], count: int, tmp_path: Path
) -> None:
    options = argparse.Namespace(count=count, streams=8, seed=1, step_timeout=20.0, logs=None)
    row = await law(options, tmp_path / "service.log")
    faults = [fault for fault in row.faults if not fault.startswith(OF_TIME_AND_SIZE)]
    assert not faults, row


def test_the_version_that_is_swapped_in_differs_in_one_layer_of_weights(tmp_path: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (LANGUAGE_MODEL, other_version(tmp_path)))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert len(changed) == 1
    assert torch.equal(before[changed[0]].float(), -after[changed[0]].float())


def test_a_run_of_some_laws_leaves_the_others_rows_in_the_table() -> None:
    text = f"before\n{BEGIN}nothing yet\n{END}after\n"
    both = with_rows(text, {"soak": "| soak | a | b | held |", "kills": "| kills | c | d | held |"})
    again = with_rows(both, {"soak": "| soak | e | f | held |"})
    assert (
        again
        == f"before\n{BEGIN}"
        + "\n".join([*HEAD, "| kills | c | d | held |", "| soak | e | f | held |"])
        + f"\n{END}after\n"
    )
