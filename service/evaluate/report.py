"""An evaluation as a table, as JSON and as a picture.

The picture needs matplotlib (the `evaluate` extra), and no display. Runs in the evaluation's process.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from service.evaluate.metrics import Estimate
from service.evaluate.running import Comparison, Evaluation

MAX_SHOWN = 10
MAX_NAMED_LABELS = 30


def table(evaluation: Evaluation) -> str:
    answers = evaluation.answers
    title = f"{answers.model or answers.service.name} {answers.version}".strip()
    lines = [f"{title}: {evaluation.num_scored:,} items scored, {len(answers.faults):,} failed"]
    lines += _rows(evaluation.estimates)
    lines += [f"  failed: line {line}: {message}" for line, message in list(answers.faults.items())[:MAX_SHOWN]]
    return "\n".join(lines)


def comparison_table(made: Comparison) -> str:
    lines = [f"second less first, on {made.num_shared:,} items that both answered"]
    lines += _rows(made.deltas, sign="+")
    if made.mcnemar_p is not None:
        better = sum(flip["gained"] > 0 for flip in made.flips)
        lines.append(
            f"  {better:,} newly right, {len(made.flips) - better:,} newly wrong; McNemar p {made.mcnemar_p:.4g}"
        )
    for change in (made.flips or made.changes)[:MAX_SHOWN]:
        sign = "+" if change["gained"] > 0 else "-"
        lines.append(f"  {sign} line {change['line']}: {_short(change['before'])} -> {_short(change['after'])}")
    return "\n".join(lines)


def _rows(estimates: Mapping[str, Estimate], sign: str = "") -> list[str]:
    return [
        f"  {name:<14} {each.value:{sign}.4f}  [{each.low:{sign}.4f}, {each.high:{sign}.4f}]"
        for name, each in estimates.items()
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def as_json(evaluation: Evaluation, made: Comparison | None, setting: Mapping[str, Any]) -> dict[str, Any]:
    report = {"setting": dict(setting), **_one(evaluation)}
    if made is not None:
        report["comparison"] = {
            "second": _one(made.second),
            "num_shared": made.num_shared,
            "deltas": _estimates(made.deltas),
            "mcnemar_p": made.mcnemar_p,
            "flips": made.flips,
            "largest_changes": made.changes,
        }
    return report


def _one(evaluation: Evaluation) -> dict[str, Any]:
    answers, scores = evaluation.answers, evaluation.scores
    found: dict[str, Any] = {
        "url": answers.service.url,
        "model": answers.model,
        "model_version": answers.version,
        "num_scored": evaluation.num_scored,
        "num_failed": len(answers.faults),
        "failures": [{"line": line, "error": message} for line, message in answers.faults.items()],
        "metrics": _estimates(evaluation.estimates),
    }
    if scores.confusion is not None:
        found["confusion"] = {"labels": scores.labels, "matrix": scores.confusion.tolist()}
    if scores.calibration:
        names = ("count", "confidence", "accuracy")
        found["calibration"] = [dict(zip(names, row, strict=True)) for row in scores.calibration]
    return found


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """JSON has no word for what is not a number."""
    return {
        name: {bound: value if math.isfinite(value) else None for bound, value in asdict(each).items()}
        for name, each in estimates.items()
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def draw(path: Path, evaluation: Evaluation, made: Comparison | None) -> None:
    """The measures with their intervals, and what the task has beside them: confusion, calibration, items."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only where a picture is wanted
    from matplotlib.figure import Figure

    scores = evaluation.scores
    panels: list[Callable[[Any, Evaluation, Comparison | None], None]] = [_draw_measures]
    if scores.confusion is not None:
        panels.append(_draw_confusion)
    if scores.calibration:
        panels.append(_draw_calibration)
    if scores.by_item is not None:
        panels.append(_draw_items)
    figure = Figure(figsize=(5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(1, len(panels), place), evaluation, made)
    figure.savefig(path, dpi=120)


def _draw_measures(axes: Any, evaluation: Evaluation, made: Comparison | None) -> None:
    """Each in the unit of the largest of its name, so that perplexity does not hide the rest."""
    both = [evaluation] if made is None else [evaluation, made.second]
    names = list(evaluation.estimates)
    for offset, each in enumerate(both):
        found = [(row, each.estimates[name]) for row, name in enumerate(names) if name in each.estimates]
        scale = [
            max(abs(one.estimates[names[row]].high) for one in both if names[row] in one.estimates) for row, _ in found
        ]
        values = np.array([[e.low, e.value, e.high] for _, e in found]) / np.maximum(scale, 1e-12)[:, None]
        spread = np.abs(values[:, [0, 2]] - values[:, [1]]).T
        heights = np.array([row for row, _ in found]) + 0.25 * offset
        label = f"{each.answers.model or each.answers.service.name} {each.answers.version}".strip()
        axes.errorbar(values[:, 1], heights, xerr=spread, fmt="o", capsize=4, label=label)
        for height, (_, known) in zip(heights, found, strict=True):
            axes.annotate(f"{known.value:.4g}", (0.02, height), va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of the largest value; 95 % intervals")
    axes.legend(fontsize="small")


def _draw_confusion(axes: Any, evaluation: Evaluation, _: Comparison | None) -> None:
    counts, names = evaluation.scores.confusion, evaluation.scores.labels
    assert counts is not None
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MAX_NAMED_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= MAX_SHOWN:
        for row, column in np.ndindex(*counts.shape):
            axes.annotate(str(counts[row, column]), (column, row), ha="center", va="center")
    axes.set_xlabel("found")
    axes.set_ylabel("right")


def _draw_calibration(axes: Any, evaluation: Evaluation, _: Comparison | None) -> None:
    counts, confidence, accuracy = (np.array(column) for column in zip(*evaluation.scores.calibration, strict=True))
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.scatter(confidence, accuracy, s=20 + 200 * counts / counts.max())
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")


def _draw_items(axes: Any, evaluation: Evaluation, made: Comparison | None) -> None:
    for each in [evaluation] if made is None else [evaluation, made.second]:
        values = each.scores.by_item
        assert values is not None
        axes.hist(values, bins=30, alpha=0.5)
    axes.set_xlabel("score of an item")
    axes.set_ylabel("items")
