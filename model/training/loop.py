"""The training loop of every stage: resume, learn, clip, step, record, validate, save.

What a step learns from is the caller's: a function from the number of the step to named losses whose gradients it has
added. A stage ends after its steps or its minutes, whichever comes first, and its rates fall by the same measure.
Losses stay on the device until they are recorded, so that a GPU never waits for Python. Runs in the training process.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.training.optimizers import Scheduled
from model.training.rounding import rounded_weights
from model.training.run import Run, learning_rate_factor

Learn = Callable[[int], dict[str, Tensor]]
Validate = Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """How long a stage takes and how its rates go; `decay` and `rounded_from` are shares of the stage, 0 to 1."""

    steps: int
    max_minutes: float | None = None
    warmup: int = 50
    decay: float = 0.5
    rounded_from: float = 1.0
    record_every: int = 10
    validate_every: int = 100
    save_every: int = 50


class Clock:
    """How far a stage has come, 0 to 1: by its steps, or by its minutes where those run out sooner.

    It runs from `start`, so that what the first step has to prepare takes nothing from the stage."""

    def __init__(self, settings: StageSettings, *, seconds: float = 0.0) -> None:
        self._steps, self._max_minutes = settings.steps, settings.max_minutes
        self._seconds_before = seconds
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.monotonic() if self._started is None else self._started

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self._seconds_before + running

    def done(self, step: int) -> float:
        by_minutes = 0.0 if self._max_minutes is None else self.seconds / (60 * self._max_minutes)
        return min(1.0, max(step / self._steps, by_minutes))


def train(
    network: nn.Module,
    optimizer: Scheduled,
    learn: Learn,
    *,
    settings: StageSettings,
    run: Run,
    validate: Validate | None = None,
    body: nn.Module | None = None,
) -> None:
    """Train in place; resumes from the run's state and leaves one behind. A finished stage costs nothing again.

    `body` is the part of the network that will be stored in 8 bits, the whole by default."""
    body = network if body is None else body
    step, seconds, losses = 0, 0.0, dict[str, list[Tensor]]()
    if (state := run.load()) is not None:
        network.load_state_dict(state["network"])
        step, seconds = state["step"], state["seconds"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
    clock = Clock(settings, seconds=seconds)
    bar = tqdm(total=settings.steps, initial=step, desc=run.folder.name, unit="step", mininterval=5)
    done = clock.done(step)
    while done < 1:
        network.train()
        rounding = done >= settings.rounded_from
        with rounded_weights(body) if rounding else nullcontext():
            for name, loss in learn(step).items():
                losses.setdefault(name, []).append(loss.detach())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step(learning_rate_factor(step, done, warmup=settings.warmup, decay=settings.decay))
        clock.start()
        step += 1
        bar.update()
        done = clock.done(step)
        if step % settings.record_every == 0 or done >= 1:
            run.record(step, **{name: float(torch.stack(found).mean()) for name, found in losses.items()})
            losses.clear()
        if validate is not None and (step % settings.validate_every == 0 or done >= 1):
            with rounded_weights(body) if rounding else nullcontext():
                run.record(step, **validate())
        if done >= 1:
            run.save({"network": network.state_dict(), "step": step, "seconds": clock.seconds})
        elif step % settings.save_every == 0:
            resumable = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            run.save({**resumable, "step": step, "seconds": clock.seconds})
    bar.close()
