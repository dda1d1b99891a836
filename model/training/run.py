"""One training run on disk: its state (to resume), its curves (CSV and PNG) and the learning-rate schedule.

A run folder holds `state.pt` (network, step, and the optimizer while unfinished) and `curve.csv`. The state is written
beside itself and renamed, so a run killed at any moment can go on. Runs in the training process.
"""

import csv
import os
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("agg")
from matplotlib import pyplot


def learning_rate_factor(step: int, done: float, *, warmup: int, decay: float) -> float:
    """Warm up, stay, then fall linearly to zero over the last `decay` of the stage (WSD, arXiv:2404.06395).

    `done` is how far the stage has come, 0 to 1: with a decay of 0.2 the rate is half its peak where `done` is 0.9.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if decay == 0 else max(0.0, min(1.0, (1 - done) / decay))


class Run:
    """The folder of one run. Owns the curve; the caller owns network and optimizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._curve = folder / "curve.csv"

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    @property
    def last_step(self) -> int:
        """The last step on the curve, 0 before the first."""
        return max((points[-1][0] for points in self.curve().values()), default=0)

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None at the start of a run."""
        if not self.state_file.exists():
            return None
        state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
        self._forget_after(state["step"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file)

    def record(self, step: int, **values: float) -> None:
        """Append values of one step to the curve."""
        with self._curve.open("a", newline="") as file:
            csv.writer(file).writerows([step, name, f"{value:.6g}"] for name, value in values.items())

    def curve(self) -> dict[str, list[tuple[int, float]]]:
        series: dict[str, list[tuple[int, float]]] = {}
        if self._curve.exists():
            with self._curve.open(newline="") as file:
                for step, name, value in csv.reader(file):
                    series.setdefault(name, []).append((int(step), float(value)))
        return series

    def _forget_after(self, step: int) -> None:
        """Drop the points that a killed run recorded after its last saved state; they will be recorded again."""
        series = self.curve()
        self._curve.unlink(missing_ok=True)
        for name, points in series.items():
            for at, value in points:
                if at <= step:
                    self.record(at, **{name: value})

    def plot(self, path: Path, *, title: str) -> None:
        """Draw the curves, one panel per value."""
        series = self.curve()
        figure, axes = pyplot.subplots(1, max(1, len(series)), figsize=(4.5 * max(1, len(series)), 3.2), squeeze=False)
        for axis, (name, points) in zip(axes[0], sorted(series.items()), strict=False):
            axis.plot([step for step, _ in points], [value for _, value in points], linewidth=1)
            axis.set(title=name.replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        figure.suptitle(title)
        figure.tight_layout()
        figure.savefig(path, dpi=80)
        pyplot.close(figure)
