"""Measures agree with scikit-learn, scipy, sacrebleu, rouge-score and values worked out by hand."""

import math

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from sklearn.metrics import confusion_matrix, f1_score

from service.evaluate import metrics
from service.evaluate.texts import bleu_and_chrf, rouge

DRAW = np.random.default_rng(0)


def test_macro_f1_and_confusion_are_those_of_scikit_learn() -> None:
    """A label that only ever is predicted counts as well; one that is nowhere does not."""
    gold, predicted = DRAW.integers(0, 4, 200), DRAW.integers(1, 5, 200)
    counts = metrics.confusion(gold, predicted, 6)
    assert (counts == confusion_matrix(gold, predicted, labels=range(6))).all()
    assert metrics.macro_f1(counts) == pytest.approx(f1_score(gold, predicted, average="macro"))


def test_rank_correlation_is_that_of_scipy_with_ties() -> None:
    left, right = DRAW.integers(0, 6, 100).astype(float), DRAW.normal(size=100)
    assert metrics.spearman(left, right) == pytest.approx(scipy.stats.spearmanr(left, right).statistic)
    assert metrics.pearson(left, right) == pytest.approx(scipy.stats.pearsonr(left, right).statistic)
    assert math.isnan(metrics.spearman(np.ones(5), right[:5]))


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.95 where half are right, 0.55 where all are."""
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([1.0, 0.0, 1.0, 1.0])
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert metrics.expected_calibration_error(np.array([1.0]), np.array([1.0])) == 0


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("a black cat", ["cat", "dog"], 0, 2 / 3),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("cat cat", ["cat"], 0, 2 / 3),
    ],
)
def test_answers_are_compared_as_by_squad(answer: str, accepted: list[str], exact: float, f1: float) -> None:
    assert metrics.exact_match(answer, accepted) == exact
    assert metrics.token_f1(answer, accepted) == pytest.approx(f1)


def test_mcnemar_is_the_two_sided_binomial_test() -> None:
    for first, second in ((0, 0), (1, 8), (5, 5), (0, 12), (40, 61)):
        expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
        assert metrics.mcnemar(first, second) == pytest.approx(expected)
    assert 0 < metrics.mcnemar(900, 1200) < 1e-9


def test_perplexity_and_bits_per_byte_by_hand() -> None:
    sums = np.array([-math.log(8), -math.log(2)])
    assert metrics.perplexity(sums, np.array([3.0, 1.0])) == pytest.approx(2)
    assert metrics.bits_per_byte(sums, np.array([2.0, 2.0])) == pytest.approx(1)


def test_bootstrap_is_seeded_and_its_interval_has_the_right_width() -> None:
    values = np.r_[np.ones(80), np.zeros(20)]
    draws = metrics.draws_of(100, 2000, 7)
    found = metrics.estimate(lambda at: float(values[at].mean()), draws, 100)
    assert found == metrics.estimate(lambda at: float(values[at].mean()), metrics.draws_of(100, 2000, 7), 100)
    assert found.value == 0.8
    assert (found.low, found.high) == pytest.approx((0.8 - 1.96 * 0.04, 0.8 + 1.96 * 0.04), abs=0.015)


def test_corpus_scores_are_those_of_sacrebleu_whatever_the_number_of_references() -> None:
    found = ["the cat sat on the mat", "a dog ran to the hill today", "very good film"]
    accepted = [["the cat sat on a mat", "the cat is on the mat"], ["the dog ran to the far hill today"], ["good film"]]
    columns = [[entry[0] for entry in accepted], ["the cat is on the mat", None, None]]
    measures = bleu_and_chrf(found, accepted)
    whole = np.arange(3)
    assert measures["bleu"](whole) == pytest.approx(sacrebleu.corpus_bleu(found, columns).score)
    assert measures["chrf"](whole) == pytest.approx(sacrebleu.corpus_chrf(found, columns).score)


def test_rouge_takes_the_best_reference() -> None:
    scores = rouge(["the cat sat", "x"], [["a dog ran", "the cat sat"], ["y"]])
    assert {name: values.tolist() for name, values in scores.items()} == {name: [1.0, 0.0] for name in scores}
