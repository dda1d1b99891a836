"""From right answers and found ones to measures: what each task's score is made of.

A measure is a function of the places of items, so that the bootstrap can draw them again, for one model or for two
side by side. Knows neither files nor services. Runs in the evaluation's process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from service.evaluate import metrics
from service.evaluate.metrics import Measure, Numbers, Places


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the service said of one item, and how sure it was."""

    prediction: Any
    confidence: float | None = None


@dataclass(slots=True, kw_only=True)
class Scores:
    """`hits` where an item is right or wrong; `by_item` where it is more or less so, higher being better."""

    measures: dict[str, Measure]
    hits: Numbers | None = None
    by_item: Numbers | None = None
    labels: list[str] = field(default_factory=list)
    confusion: Places | None = None
    calibration: list[tuple[int, float, float]] = field(default_factory=list)


class ScoringOptions(Protocol):
    @property
    def bleu_tokenizer(self) -> str: ...


def labels(gold: Sequence[str], found: Sequence[Found], _: ScoringOptions) -> Scores:
    predicted = [entry.prediction for entry in found]
    names = sorted({*gold, *predicted})
    places = {name: place for place, name in enumerate(names)}
    rows = np.array([places[name] for name in gold], dtype=np.int64)
    columns = np.array([places[name] for name in predicted], dtype=np.int64)
    hits = (rows == columns).astype(np.float64)
    measures: dict[str, Measure] = {
        "accuracy": mean_of(hits),
        "macro_f1": lambda at: metrics.macro_f1(metrics.confusion(rows[at], columns[at], len(names))),
    }
    scores = Scores(measures=measures, hits=hits, labels=names)
    scores.confusion = metrics.confusion(rows, columns, len(names))
    known = [entry.confidence for entry in found if entry.confidence is not None]
    if len(known) == len(found):
        confidence = np.array(known, dtype=np.float64)
        measures["ece"] = lambda at: metrics.expected_calibration_error(confidence[at], hits[at])
        scores.calibration = metrics.calibration_bins(confidence, hits)
    return scores


def similarities(gold: Sequence[float], found: Sequence[Found], _: ScoringOptions) -> Scores:
    wanted = np.array(gold, dtype=np.float64)
    scored = np.array([entry.prediction for entry in found], dtype=np.float64)
    return Scores(
        measures={
            "spearman": lambda at: metrics.spearman(wanted[at], scored[at]),
            "pearson": lambda at: metrics.pearson(wanted[at], scored[at]),
        }
    )


def summaries(gold: Sequence[list[str]], found: Sequence[Found], _: ScoringOptions) -> Scores:
    from service.evaluate.texts import rouge  # only where the `evaluate` extra is needed

    by_name = rouge([entry.prediction for entry in found], gold)
    return Scores(measures={name: mean_of(values) for name, values in by_name.items()}, by_item=by_name["rougeL"])


def translations(gold: Sequence[list[str]], found: Sequence[Found], options: ScoringOptions) -> Scores:
    from service.evaluate.texts import bleu_and_chrf  # only where the `evaluate` extra is needed

    measures = bleu_and_chrf([entry.prediction for entry in found], gold, tokenizer=options.bleu_tokenizer)
    chrf = measures["chrf"]
    by_item = np.array([chrf(np.array([place])) for place in range(len(found))], dtype=np.float64)
    return Scores(measures=measures, by_item=by_item)


def answers(gold: Sequence[list[str]], found: Sequence[Found], _: ScoringOptions) -> Scores:
    pairs = [(entry.prediction, accepted) for entry, accepted in zip(found, gold, strict=True)]
    exact = np.array([metrics.exact_match(*pair) for pair in pairs], dtype=np.float64)
    overlap = np.array([metrics.token_f1(*pair) for pair in pairs], dtype=np.float64)
    return Scores(measures={"exact_match": mean_of(exact), "f1": mean_of(overlap)}, hits=exact, by_item=overlap)


def likelihoods(gold: Sequence[int], found: Sequence[Found], _: ScoringOptions) -> Scores:
    """The first token of a text has no likelihood of its own: its bytes are counted all the same."""
    sums = np.array([entry.prediction[0] for entry in found], dtype=np.float64)
    counts = np.array([entry.prediction[1] for entry in found], dtype=np.float64)
    sizes = np.array(gold, dtype=np.float64)
    return Scores(
        measures={
            "perplexity": lambda at: metrics.perplexity(sums[at], counts[at]),
            "bits_per_byte": lambda at: metrics.bits_per_byte(sums[at], sizes[at]),
        },
        by_item=sums / np.maximum(counts, 1),
    )


def mean_of(values: Numbers) -> Measure:
    return lambda at: float(values[at].mean())
