"""Small heads that share one body: the folder `heads/<task>/` inside a checkpoint, as `model.training.heads` writes it.

    heads/<task>/config.json        {"kind", "input", "labels", "problem_type", "temperature", "max_length"}
    heads/<task>/model.safetensors  "weight" [N, E] and "bias" [N]

Reads the configs alone: the weights are `model.task_head_modules`'s. No torch; both processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.architectures.raw import RawConfig, read_json

HEADS_FOLDER = "heads"

TaskHeadKind = Literal["classification", "span", "token"]
TaskHeadInput = Literal["cls", "embedding", "tokens"]

KINDS: Mapping[str, TaskHeadKind] = {"classification": "classification", "span": "span", "token": "token"}
INPUTS: Mapping[str, TaskHeadInput] = {"cls": "cls", "embedding": "embedding", "tokens": "tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHeadConfig:
    """One linear map: over a text's first state, over its embedding, or (spans, tokens) over every token's state."""

    folder: Path
    kind: TaskHeadKind
    input: TaskHeadInput
    labels: tuple[str, ...]
    problem_type: str | None = None
    temperature: float | None = None
    """Fitted on held-back rows when the head was trained."""
    max_length: int | None = None
    """Tokens of the longest text that it was trained on."""

    @property
    def num_outputs(self) -> int:
        return 2 if self.kind == "span" else len(self.labels)


def read_task_heads(folder: Path) -> dict[str, TaskHeadConfig]:
    """The heads of a checkpoint by name, none where it has no such folder.

    Raises: CheckpointError that names the file and the key at fault.
    """
    paths = sorted((folder / HEADS_FOLDER).glob("*/config.json"))
    return {path.parent.name: _read(path) for path in paths}


def _read(path: Path) -> TaskHeadConfig:
    raw = RawConfig(read_json(path), str(Path(HEADS_FOLDER) / path.parent.name / path.name))
    kind: TaskHeadKind = raw.choice("kind", KINDS)
    input: TaskHeadInput = raw.choice("input", INPUTS)
    labels = raw.texts("labels") if "labels" in raw else ()
    if (kind in ("span", "token")) != (input == "tokens"):
        raise raw.wrong("input", "tokens for a span or token head, cls or embedding for any other")
    if kind != "span" and not labels:
        raise raw.wrong("labels", "the names of the head's outputs")
    temperature = raw.number("temperature") if "temperature" in raw else None
    if temperature is not None and not 0 < temperature < float("inf"):
        raise raw.wrong("temperature", "a number above 0")
    return TaskHeadConfig(
        folder=path.parent,
        kind=kind,
        input=input,
        labels=labels,
        problem_type=raw.text("problem_type") if "problem_type" in raw else None,
        temperature=temperature,
        max_length=raw.size("max_length") if "max_length" in raw else None,
    )
