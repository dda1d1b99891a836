"""Scores of predictions against labelled data, and how sure one may be of them.

Pure functions over lists and numpy arrays; nothing here knows where predictions come from. ROUGE, BLEU and chrF are
`rouge-score`'s and `sacrebleu`'s (the `evaluate` extra). Runs in the evaluation's process.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]
Measure = Callable[[Places], float]
"""One number of the items at these places (with repetitions, where they are drawn)."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUM_BINS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A measure of all items, with the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float


def estimate(measure: Measure, draws: Sequence[Places], count: int) -> Estimate:
    """Percentile bootstrap over `draws` of the items; a draw in which the measure is undefined is left out."""
    drawn = [measure(places) for places in draws]
    sound = [value for value in drawn if math.isfinite(value)]
    value = measure(np.arange(count))
    low, high = np.percentile(sound, [2.5, 97.5]) if sound else (value, value)
    return Estimate(value=value, low=float(low), high=float(high))


def draws_of(count: int, num_draws: int, seed: int) -> list[Places]:
    """As many samples of the items with replacement; the same for the same seed, so that two models share them."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, count, count) for _ in range(num_draws)]


def confusion(gold: Places, predicted: Places, num_labels: int) -> Places:
    """Counts [gold, predicted]."""
    flat = np.bincount(gold * num_labels + predicted, minlength=num_labels * num_labels)
    return flat.reshape(num_labels, num_labels).astype(np.int64)


def macro_f1(counts: Places) -> float:
    """The mean of the F1 of each label that is there, in the data or among the predictions."""
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    present = rows + columns > 0
    return float(np.mean(2 * counts.diagonal()[present] / (rows + columns)[present]))


def calibration_bins(confidence: Numbers, correct: Numbers) -> list[tuple[int, float, float]]:
    """Of each of 15 bins of equal width that is not empty: how many, their mean confidence, their accuracy."""
    places = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    found = []
    for number in np.unique(places):
        inside = places == number
        found.append((int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean())))
    return found


def expected_calibration_error(confidence: Numbers, correct: Numbers) -> float:
    """arXiv:1706.04599, equation 3."""
    bins = calibration_bins(confidence, correct)
    return sum(count * abs(mean - accuracy) for count, mean, accuracy in bins) / len(confidence)


def pearson(left: Numbers, right: Numbers) -> float:
    """Not a number where one side is constant."""
    left, right = left - left.mean(), right - right.mean()
    scale = math.sqrt(float((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / scale if scale > 0 else math.nan


def spearman(left: Numbers, right: Numbers) -> float:
    return pearson(ranks(left), ranks(right))


def ranks(values: Numbers) -> Numbers:
    """From 1 up; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Numbers = (last - (counts - 1) / 2)[inverse]
    return found


def normalized_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Without accepted answers, the right one is none."""
    return float(normalized_answer(answer) in {normalized_answer(text) for text in accepted or [""]})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """The best overlap of words with an accepted answer, as SQuAD 2 counts it."""
    return max(
        _overlap(normalized_answer(answer).split(), normalized_answer(text).split()) for text in accepted or [""]
    )


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def perplexity(log_likelihoods: Numbers, num_tokens: Numbers) -> float:
    """exp of the mean negative log-likelihood of a token, over all texts together."""
    return float(np.exp(-log_likelihoods.sum() / num_tokens.sum()))


def bits_per_byte(log_likelihoods: Numbers, num_bytes: Numbers) -> float:
    return float(-log_likelihoods.sum() / math.log(2) / num_bytes.sum())


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of as uneven a split of the items that one model alone gets right (binomial, one half)."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    # Whole numbers to the end: 2**total is past any float's range for a thousand flips.
    return min(1.0, float(Fraction(2 * tail, 1 << total)))
