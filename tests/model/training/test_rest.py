"""What the service measured becomes part of a checkpoint's evaluation, whole or not at all."""

import json
import shutil

import pytest

from model.training.rest import read
from tests.model.training.test_checkpoints import ENCODER


def report(**changes):
    measured = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "ece": {"value": 0.1, "low": 0, "high": 1}}
    return {"model": ENCODER.name, "num_failed": 0, "num_scored": 9, "metrics": measured} | changes


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / ENCODER.name
    folder.mkdir()
    shutil.copy(ENCODER / "evaluation.json", folder)
    return folder


@pytest.mark.parametrize("changes", [{"num_failed": 1}, {"model": "another"}])
def test_a_report_that_is_partial_or_of_another_checkpoint_is_refused(tmp_path, checkpoint, changes):
    (tmp_path / "spam.json").write_text(json.dumps(report(**changes)))
    with pytest.raises(ValueError, match=r"spam\.json"):
        read(tmp_path, checkpoint)
    assert (checkpoint / "evaluation.json").read_bytes() == (ENCODER / "evaluation.json").read_bytes()


def test_the_measures_of_every_report_are_in_the_evaluation_and_on_the_card(tmp_path, checkpoint):
    rates = {"exact_match": {"value": 0.25}, "f1": {"value": 0.75}}
    for name in ("sentiment", "intents", "spam"):
        (tmp_path / f"{name}.json").write_text(json.dumps(report()))
    (tmp_path / "answers.json").write_text(json.dumps(report(metrics=rates)))
    read(tmp_path, checkpoint)
    found = json.loads((checkpoint / "evaluation.json").read_text())["through_the_service"]
    assert found["spam"] == {"count": 9, "accuracy": 0.5}
    assert "0.250 / 0.750" in (checkpoint / "README.md").read_text()
