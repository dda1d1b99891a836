"""`slimpajama calibrate`: fits a checkpoint's temperature on labelled examples and writes it into its folder.

Asks a running service for the logits, so that what is calibrated is exactly what is served: same tokens, same dtype,
same template. The service reads `calibration.json` when it next starts. A process of its own, without torch.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from model.calibration import Calibration, read_calibration, write_calibration
from model.description import fingerprint
from model.errors import CheckpointError
from service.tasks.confidence import Numbers
from service.tasks.temperature import Fit, Targets, fit_temperature, measure

TIMEOUT_SECONDS = 600.0
FEWEST_EXAMPLES = 10


class CalibrateError(Exception):
    """The data, the service or the folder is not what it should be; the message says which and how."""


@dataclass(frozen=True, slots=True)
class Example:
    text: str
    label: str


@dataclass(slots=True, kw_only=True)
class Logits:
    """What the service gave: `values` [N, L] in the order of `labels`."""

    kind: str
    activation: Literal["softmax", "sigmoid"]
    labels: list[str]
    values: Numbers


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 with what is wrong on standard error."""
    options = _parser().parse_args(arguments)
    try:
        report = calibrate(options)
    except (CalibrateError, CheckpointError) as error:
        sys.stderr.write(f"slimpajama calibrate: {error}\n")
        return 1
    sys.stdout.write(report + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slimpajama calibrate", description="Fit a classifier's confidence.")
    parser.add_argument("--url", required=True, help="the running service, like http://127.0.0.1:8000")
    parser.add_argument("--data", required=True, type=Path, help='a JSONL file of {"text": ..., "label": ...}')
    parser.add_argument("--folder", required=True, type=Path, help="the checkpoint's folder, to write the file into")
    parser.add_argument("--api-key", help="where the service asks for one")
    parser.add_argument("--model", help="the checkpoint's name in the service (default: the one that would answer)")
    parser.add_argument("--head", help="one of the checkpoint's task heads")
    parser.add_argument("--labels", help="zero-shot labels, separated by commas; or `data` for those in the file")
    parser.add_argument("--hypothesis-template", help="how a label becomes a hypothesis")
    parser.add_argument("--batch-size", type=int, default=64, help="texts in a request")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    return parser


def calibrate(options: argparse.Namespace) -> str:
    """Fits, writes, and says what came of it."""
    raw = _read(options.data)
    examples = list(_examples(raw, options.data))
    logits = _ask(options, examples)
    places = {label: place for place, label in enumerate(logits.labels)}
    unknown = sorted({example.label for example in examples} - set(places))
    if unknown:
        raise CalibrateError(f"{options.data}: the model has no label '{unknown[0]}'; it has: {', '.join(places)}")
    targets: Targets = np.array([places[example.label] for example in examples], dtype=np.int64)
    temperature = fit_temperature(logits.values, targets, logits.activation)
    before = measure(logits.values, targets, 1.0, logits.activation)
    after = measure(logits.values, targets, temperature, logits.activation)
    accuracy = float((logits.values.argmax(axis=1) == targets).mean())
    fitted_on = {
        "n": len(examples),
        "accuracy": accuracy,
        "ece": {"before": before.ece, "after": after.ece},
        "brier": {"before": before.brier, "after": after.brier},
        "nll": {"before": before.nll, "after": after.nll},
        "data_sha256": hashlib.sha256(raw).hexdigest(),
        "date": datetime.now(UTC).date().isoformat(),
        "checkpoint_version": fingerprint(options.folder),
    }
    path = _write(options.folder, logits.kind, temperature, fitted_on)
    return _report(path, logits.kind, temperature, len(examples), accuracy, before, after)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrateError(f"cannot read {path}: {error.strerror}") from error


def _examples(raw: bytes, path: Path) -> Iterator[Example]:
    count = 0
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise CalibrateError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("text", "label")):
            raise CalibrateError(f'{path}, line {number}: expected {{"text": "...", "label": "..."}}')
        count += 1
        yield Example(entry["text"], entry["label"])
    if count < FEWEST_EXAMPLES:
        raise CalibrateError(f"{path} has {count} examples; fewer than {FEWEST_EXAMPLES} fit nothing but chance")


def _ask(options: argparse.Namespace, examples: Sequence[Example]) -> Logits:
    """All logits, a batch of texts at a time."""
    body = _body(options, examples)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    rows: list[dict[str, float]] = []
    answer: dict[str, Any] = {}
    with httpx.Client(base_url=options.url, timeout=TIMEOUT_SECONDS, headers=headers) as client:
        for start in range(0, len(examples), options.batch_size):
            texts = [example.text for example in examples[start : start + options.batch_size]]
            answer = _post(client, body | {"input": texts})
            rows += [_row(entry, start) for entry in answer["data"]]
    if answer["activation"] == "none":
        raise CalibrateError(f"{answer['model']} gives numbers and no probabilities: there is nothing to calibrate")
    labels = list(rows[0])
    method = answer["method"]
    return Logits(
        kind=f"head/{options.head}" if method == "head" else method,
        activation=answer["activation"],
        labels=labels,
        values=np.array([[row[label] for label in labels] for row in rows], dtype=np.float64),
    )


def _body(options: argparse.Namespace, examples: Sequence[Example]) -> dict[str, Any]:
    labels = None
    if options.labels == "data":
        labels = sorted({example.label for example in examples})
    elif options.labels:
        labels = [label.strip() for label in options.labels.split(",")]
    body = {
        "model": options.model, "head": options.head, "labels": labels, "raw_scores": True,
        "hypothesis_template": options.hypothesis_template, "truncate": options.truncate,
    }  # fmt: skip
    return {key: value for key, value in body.items() if value is not None}


def _post(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    try:
        response = client.post("/v1/classify", json=body)
        answer = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise CalibrateError(f"{client.base_url} does not answer: {error}") from error
    if response.status_code != 200:
        raise CalibrateError(f"the service refuses: {answer.get('error', {}).get('message', response.text[:200])}")
    found: dict[str, Any] = answer
    return found


def _row(entry: dict[str, Any], start: int) -> dict[str, float]:
    if "error" in entry:
        raise CalibrateError(f"example {start + entry['index'] + 1} fails: {entry['error']['message']}")
    return {row["label"]: row["score"] for row in entry["labels"]}


def _write(folder: Path, kind: str, temperature: float, fitted_on: dict[str, Any]) -> Path:
    """Adds one kind to those that the file has already."""
    known = read_calibration(folder, fitted_on["checkpoint_version"])
    calibration = Calibration({**known.temperature, kind: temperature}, {**known.fitted_on, kind: fitted_on})
    try:
        return write_calibration(folder, calibration)
    except OSError as error:
        raise CalibrateError(f"cannot write into {folder}: {error.strerror}") from error


def _report(path: Path, kind: str, temperature: float, count: int, accuracy: float, before: Fit, after: Fit) -> str:
    lines = [f"{path}: {kind}, temperature {temperature:.4f}, fitted on {count:,} examples, accuracy {accuracy:.4f}"]
    lines += [f"  {name:<6} {value:.4f} -> {asdict(after)[name]:.4f}" for name, value in asdict(before).items()]
    return "\n".join([*lines, "Restart the service to use it."])
