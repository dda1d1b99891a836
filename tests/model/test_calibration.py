"""The calibration file and the configs of task heads: what is read, what is refused and how."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.calibration import Calibration, read_calibration, write_calibration
from model.errors import CheckpointError
from model.task_heads import read_task_heads


def test_what_was_written_is_read(tmp_path: Path) -> None:
    calibration = Calibration(
        {"classifier": 1.5, "head/intent": 0.7}, {"classifier": {"n": 3, "checkpoint_version": "v"}}
    )
    write_calibration(tmp_path, calibration)
    assert read_calibration(tmp_path, "v") == calibration
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_a_folder_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_calibration(tmp_path, "v") == Calibration()


def test_a_calibration_of_other_weights_is_refused(tmp_path: Path) -> None:
    write_calibration(tmp_path, Calibration({"nli": 2.0}, {"nli": {"checkpoint_version": "old"}}))
    with pytest.raises(CheckpointError, match=r"version old of this checkpoint, which is now new: remove the file"):
        read_calibration(tmp_path, "new")


@pytest.mark.parametrize(
    "document",
    [
        [], {"version": 2, "temperature": {}}, {"temperature": {}}, {"version": 1},
        {"version": 1, "temperature": {"nli": 0}}, {"version": 1, "temperature": {"nli": -1}},
        {"version": 1, "temperature": {"nli": "2"}}, {"version": 1, "temperature": {"nli": float("nan")}},
        {"version": 1, "temperature": {"nli": float("inf")}}, {"version": 1, "temperature": {}, "fitted_on": 5},
        {"version": 1, "temperature": {}, "fitted_on": {"nli": 5}},
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_refused(document: Any, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError):
        read_calibration(tmp_path, "v")


HEAD = {"kind": "classification", "input": "cls", "labels": ["a", "b"], "temperature": 1.5, "max_length": 128}


def save_head(folder: Path, config: dict[str, Any], name: str = "intent") -> None:
    place = folder / "heads" / name
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))


def test_task_heads_are_read_by_name(tmp_path: Path) -> None:
    save_head(tmp_path, HEAD)
    save_head(tmp_path, {"kind": "span", "input": "tokens", "labels": []}, "answer")
    found = read_task_heads(tmp_path)
    assert list(found) == ["answer", "intent"]
    assert (found["intent"].labels, found["intent"].temperature, found["intent"].num_outputs) == (("a", "b"), 1.5, 2)
    assert (found["answer"].kind, found["answer"].num_outputs) == ("span", 2)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "regression"}, {"input": "mean"}, {"input": "tokens"}, {"labels": []}, {"labels": [1]},
        {"temperature": 0}, {"max_length": 0}, {"kind": "span"},
    ],
)  # fmt: skip
def test_a_wrong_head_is_refused_by_file(change: dict[str, Any], tmp_path: Path) -> None:
    save_head(tmp_path, HEAD | change)
    with pytest.raises(CheckpointError, match=r"heads/intent/config\.json"):
        read_task_heads(tmp_path)
