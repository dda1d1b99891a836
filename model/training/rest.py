"""The held-out rows as files for `slimpajama evaluate`, and what it measured as part of a checkpoint's evaluation.

    python -m model.training.rest write DATA FOLDER           FOLDER/sentiment.jsonl, intents.jsonl, ...
    slimpajama evaluate --url URL --task sentiment --data FOLDER/sentiment.jsonl --json FOLDER/sentiment.json
    python -m model.training.rest read FOLDER CHECKPOINT      into CHECKPOINT/evaluation.json and its card

So the card says what the recipe computes and what a user of the service gets. Knows files, nothing of the service.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.training import corpus, sources
from model.training.cards import MEASURED_LATER, render_card
from model.training.sources import LabelledText

Row = dict[str, Any]
MEASURES = ("accuracy", "macro_f1", "exact_match", "f1", "rouge1", "rougeL")


def _labelled(rows: Iterable[LabelledText]) -> list[Row]:
    return [{"text": row.text, "label": row.label} for row in rows]


def held_out_rows(data: Path) -> dict[str, list[Row]]:
    """The lines of each file, in the fields that `slimpajama evaluate` reads."""
    questions = corpus.questions(data)[1]
    return {
        "sentiment": _labelled(corpus.sentiment(data).test),
        "intents": _labelled(corpus.intents(data).test),
        "spam": _labelled(corpus.spam(data).test),
        "answers": [
            {"question": row.question, "context": row.context, "answers": [text for _, text in row.answers]}
            for row in questions
        ],
        "summaries": [{"document": row.document, "summaries": row.summaries} for row in sources.scitldr(data, "test")],
    }


def write(data: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in held_out_rows(data).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path, checkpoint: Path) -> None:
    """Put the measures of every report in the folder into the checkpoint's evaluation, and write its card anew.

    Raises: ValueError where a report leaves items out, or is of another checkpoint."""
    file = checkpoint / "evaluation.json"
    evaluation = json.loads(file.read_text())
    found = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if report["num_failed"] or report["model"] != checkpoint.name:
            raise ValueError(f"{path}: {report['num_failed']} items failed; made by {report['model']}")
        measures = {name: report["metrics"][name]["value"] for name in MEASURES if name in report["metrics"]}
        found[path.stem] = {"count": report["num_scored"], **measures}
    evaluation[MEASURED_LATER] = found
    file.write_text(json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    (checkpoint / "README.md").write_text(render_card(checkpoint))


if __name__ == "__main__":
    what, first, second = sys.argv[1:]
    {"write": write, "read": read}[what](Path(first), Path(second))
