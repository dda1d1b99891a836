"""The measures of the evaluation, as plain functions of predictions and references.

Accuracy, macro-F1, precision and recall, expected calibration error, Spearman, SQuAD exact match and F1, ROUGE (by
rouge-score), and the n-gram baseline of the language model. Knows no networks and no files. Runs in the training
process.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    return float(np.mean(np.asarray(predicted) == np.asarray(wanted)))


def macro_f1(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """The unweighted mean of the F1 of every class that occurs."""
    p, w = np.asarray(predicted), np.asarray(wanted)
    scores = []
    for label in np.unique(np.concatenate([p, w])):
        hits = int(np.sum((p == label) & (w == label)))
        scores.append(2 * hits / (int(np.sum(p == label)) + int(np.sum(w == label))))
    return float(np.mean(scores))


def precision_recall_f1(predicted: Sequence[bool], wanted: Sequence[bool]) -> dict[str, float]:
    """Of the class True; there must be some in both."""
    hits = sum(p and w for p, w in zip(predicted, wanted, strict=True))
    precision, recall = hits / sum(predicted), hits / sum(wanted)
    return {"precision": precision, "recall": recall, "f1": 2 * hits / (sum(predicted) + sum(wanted))}


def calibration_error(probabilities: NDArray[np.float32], wanted: Sequence[int], *, num_bins: int = 15) -> float:
    """Expected calibration error of the top class over equal-width bins of its probability."""
    top, confidence = probabilities.argmax(1), probabilities.max(1)
    right = top == np.asarray(wanted)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    return float(np.sum(gaps))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties by average rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def normalize_answer(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(predicted: str, references: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1), the best over the references."""
    exact = max(float(normalize_answer(predicted) == normalize_answer(reference)) for reference in references)
    return exact, max(_word_f1(normalize_answer(predicted), normalize_answer(ref)) for ref in references)


def _word_f1(predicted: str, reference: str) -> float:
    words, wanted = predicted.split(), reference.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def rouge(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean ROUGE-1 and ROUGE-L F1 with stemming, the best reference of each (by ROUGE-1, ROUGE-L separately)."""
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    totals = {"rouge1": 0.0, "rougeL": 0.0}
    for text, wanted in zip(predicted, references, strict=True):
        scores = [scorer.score(reference, text) for reference in wanted]
        for name in totals:
            totals[name] += max(score[name].fmeasure for score in scores)
    return {name: total / len(predicted) for name, total in totals.items()}


class NGrams:
    """Token n-grams with interpolated absolute discounting (Ney 1994), backing off to shorter histories."""

    def __init__(self, stream: NDArray[np.uint16], *, order: int, vocab_size: int, discount: float = 0.75) -> None:
        self._order, self._discount, self._vocab = order, discount, vocab_size
        self._bits = (vocab_size - 1).bit_length()
        assert order * self._bits <= 64
        self._tables = [self._count(stream, length) for length in range(1, order + 1)]

    def _keys(self, stream: NDArray[np.uint16], length: int) -> NDArray[np.uint64]:
        """One integer per n-gram of the stream, the oldest token in the highest bits."""
        count = len(stream) - length + 1
        keys = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            keys = (keys << np.uint64(self._bits)) | stream[offset : offset + count].astype(np.uint64)
        return keys

    def _count(self, stream: NDArray[np.uint16], length: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        keys, counts = np.unique(self._keys(stream, length), return_counts=True)
        return keys, counts

    def log_probabilities(self, stream: NDArray[np.uint16]) -> NDArray[np.float64]:
        """Natural log of each token's probability from the `order`-th token on."""
        target = slice(self._order - 1, None)
        keys, counts = self._tables[0]
        total = counts.sum()
        probability = (_find(keys, counts, stream[target].astype(np.uint64)) + 1.0) / (total + self._vocab)
        for length in range(2, self._order + 1):
            grams = self._keys(stream[self._order - length :], length)
            keys, counts = self._tables[length - 1]
            seen = _find(keys, counts, grams)
            histories, first = np.unique(keys >> np.uint64(self._bits), return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(keys)))
            history = grams >> np.uint64(self._bits)
            total_here, kinds_here = _find(histories, totals, history), _find(histories, kinds, history)
            known = np.maximum(total_here, 1)
            mixed = (np.maximum(seen - self._discount, 0) + self._discount * kinds_here * probability) / known
            probability = np.where(total_here > 0, mixed, probability)
        logs: NDArray[np.float64] = np.log(probability)
        return logs


def _find(keys: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`values` at the wanted keys, zero where a key is absent; `keys` ascend."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: NDArray[np.int64] = np.where(keys[place] == wanted, values[place], 0)
    return found
