"""How sure a checkpoint's scores may be taken: `calibration.json` in its folder, written by `slimpajama calibrate`.

    {"version": 1, "temperature": {KIND: number}, "fitted_on": {KIND: {"n", "ece", "brier", "nll", "data_sha256", ...}}}

A kind is the way in which the service came to the logits ("classifier", "head/intent", "nli/" with a digest of the
labels, ...); their quotient by its temperature gives probabilities that mean what they say (Guo et al. 2017,
arXiv:1706.04599). No torch. Both processes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.architectures.raw import RawConfig, read_json
from model.errors import CheckpointError

FILE_NAME = "calibration.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """`temperature` by kind; `fitted_on` says on what, and what it was good for."""

    temperature: Mapping[str, float] = field(default_factory=dict)
    fitted_on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_calibration(folder: Path, checkpoint_version: str) -> Calibration:
    """The folder's calibration, empty where it has none.

    Raises: CheckpointError for a file that is not what it should be, or that was fitted on other weights than these.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return Calibration()
    raw = RawConfig(read_json(path), FILE_NAME)
    if raw.whole("version") != FORMAT_VERSION:
        raise raw.wrong("version", f"{FORMAT_VERSION}")
    temperatures = raw.section("temperature")
    found = {kind: temperatures.number(kind) for kind in temperatures}
    for kind, temperature in found.items():
        if not 0 < temperature < float("inf"):
            raise temperatures.wrong(kind, "a number above 0")
    fitted_on = raw.section("fitted_on") if "fitted_on" in raw else RawConfig({}, FILE_NAME)
    reports = {kind: fitted_on.section(kind).values for kind in fitted_on}
    for kind in found:
        fitted_version = reports.get(kind, {}).get("checkpoint_version", checkpoint_version)
        if fitted_version != checkpoint_version:
            raise CheckpointError(
                f"{path}: '{kind}' was fitted on version {fitted_version} of this checkpoint, which is now "
                f"{checkpoint_version}: remove the file and run `slimpajama calibrate` again",
                file=FILE_NAME,
            )
    return Calibration(found, reports)


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """Writes the file as a whole, or not at all."""
    document = {
        "version": FORMAT_VERSION,
        "temperature": dict(calibration.temperature),
        "fitted_on": {kind: dict(report) for kind, report in calibration.fitted_on.items()},
    }
    path = folder / FILE_NAME
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(path)
    return path
