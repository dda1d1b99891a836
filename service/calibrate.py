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

from model.adapters.folder import find_base, joined
from model.calibration import Calibration, read_calibration, write_calibration
from model.description import fingerprint
from model.errors import CheckpointError
from model.gguf.container import SUFFIX as GGUF_SUFFIX
from model.gguf.folder import unpacked
from service.tasks.classification import calibration_kind
from service.tasks.confidence import Numbers
from service.tasks.temperature import Fit, Targets, are_right, fit_temperature, measure
from service.tasks.zero_shot import DEFAULT_TEMPLATE, LabelSet

TIMEOUT_SECONDS = 600.0
FEWEST_EXAMPLES = 10
DATA_HELP = 'a JSONL file of {"text": ..., "label": ...}, or "labels": [...] where they do not exclude each other'

FOLDER_HELP = "the checkpoint's folder, to write the file into, or its GGUF file, to write it beside"


class CalibrateError(Exception):
    """The data, the service or the folder is not what it should be; the message says which and how."""


@dataclass(frozen=True, slots=True)
class Example:
    """`labels` are all that are right; only of those that do not exclude each other can there be none or several."""

    text: str
    labels: tuple[str, ...]


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
    parser.add_argument("--data", required=True, type=Path, help=DATA_HELP)
    parser.add_argument("--folder", required=True, type=Path, help=FOLDER_HELP)
    parser.add_argument("--api-key", help="where the service asks for one")
    parser.add_argument("--model", help="the checkpoint's name in the service (default: the one that would answer)")
    parser.add_argument("--head", help="one of the checkpoint's task heads")
    parser.add_argument("--labels", help="zero-shot labels, separated by commas; or `data` for those in the file")
    parser.add_argument("--hypothesis-template", help="how a label becomes a hypothesis")
    parser.add_argument("--multi-label", action="store_true", help="zero-shot labels do not exclude each other")
    parser.add_argument("--batch-size", type=int, default=64, help="texts in a request")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    return parser


def calibrate(options: argparse.Namespace) -> str:
    """Fits, writes, and says what came of it."""
    version = fitted_version(options.folder)
    raw = _read(options.data)
    examples = list(_examples(raw, options.data))
    logits = _ask(options, examples)
    targets = _targets(options.data, examples, logits)
    temperature = fit_temperature(logits.values, targets, logits.activation)
    before = measure(logits.values, targets, 1.0, logits.activation)
    after = measure(logits.values, targets, temperature, logits.activation)
    accuracy = float(are_right(logits.values, targets).mean())
    fitted_on = {
        **({"labels": logits.labels, "hypothesis_template": options.hypothesis_template} if options.labels else {}),
        "n": len(examples),
        "accuracy": accuracy,
        "ece": {"before": before.ece, "after": after.ece},
        "brier": {"before": before.brier, "after": after.brier},
        "nll": {"before": before.nll, "after": after.nll},
        "data_sha256": hashlib.sha256(raw).hexdigest(),
        "date": datetime.now(UTC).date().isoformat(),
        "checkpoint_version": version,
    }
    folder = options.folder if options.folder.is_dir() else options.folder.parent
    path = _write(folder, logits.kind, temperature, fitted_on)
    return _report(path, logits.kind, temperature, len(examples), accuracy, before, after)


def fitted_version(folder: Path) -> str:
    """What a calibration in the folder, or beside the GGUF file, is of: an adapter is nothing without its base.

    Raises: CalibrateError if there is no such folder or file, CheckpointError if it is not what it should be.
    """
    if not (folder.is_dir() or (folder.is_file() and folder.suffix == GGUF_SUFFIX)):
        raise CalibrateError(f"{folder} is neither a folder nor a GGUF file")
    with unpacked(folder) as plain, joined(plain, find_base(plain)) as whole:
        return fingerprint(whole)


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
        labels = entry.get("labels", [entry.get("label")]) if isinstance(entry, dict) else None
        if not isinstance(labels, list) or not all(isinstance(part, str) for part in (entry.get("text"), *labels)):
            raise CalibrateError(f'{path}, line {number}: expected {{"text": "...", "label": "..."}}')
        count += 1
        yield Example(entry["text"], tuple(labels))
    if count < FEWEST_EXAMPLES:
        raise CalibrateError(f"{path} has {count} examples; fewer than {FEWEST_EXAMPLES} fit nothing but chance")


def _targets(path: Path, examples: Sequence[Example], logits: Logits) -> Targets:
    """Which labels are right, [N, L]."""
    places = {label: place for place, label in enumerate(logits.labels)}
    targets: Targets = np.zeros(logits.values.shape, dtype=np.bool_)
    for number, example in enumerate(examples, start=1):
        if logits.activation == "softmax" and len(example.labels) != 1:
            raise CalibrateError(f"{path}, example {number}: the labels exclude each other, and one is right")
        for label in example.labels:
            if label not in places:
                raise CalibrateError(f"{path}: the model has no label '{label}'; it has: {', '.join(places)}")
            targets[number - 1, places[label]] = True
    return targets


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
        kind=calibration_kind(method, head=options.head or "", labels=_label_set(body)),
        activation=answer["activation"],
        labels=labels,
        values=np.array([[row[label] for label in labels] for row in rows], dtype=np.float64),
    )


def _body(options: argparse.Namespace, examples: Sequence[Example]) -> dict[str, Any]:
    labels = None
    if options.labels == "data":
        labels = sorted({label for example in examples for label in example.labels})
    elif options.labels:
        labels = [label.strip() for label in options.labels.split(",")]
    body = {
        "model": options.model, "head": options.head, "labels": labels, "raw_scores": True,
        "hypothesis_template": options.hypothesis_template, "truncate": options.truncate,
        "multi_label": options.multi_label or None,
    }  # fmt: skip
    return {key: value for key, value in body.items() if value is not None}


def _label_set(body: dict[str, Any]) -> LabelSet | None:
    if "labels" not in body:
        return None
    template = body.get("hypothesis_template", DEFAULT_TEMPLATE)
    return LabelSet(labels=tuple(body["labels"]), template=template, multi_label="multi_label" in body)


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
