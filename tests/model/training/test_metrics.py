"""The measures against scikit-learn, scipy and hand-worked values."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from model.training import metrics


def test_macro_f1_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    predicted, wanted = rng.integers(0, 5, 200).tolist(), rng.integers(0, 5, 200).tolist()
    assert metrics.macro_f1(predicted, wanted) == pytest.approx(f1_score(wanted, predicted, average="macro"))


def test_spearman_with_ties_is_that_of_scipy():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 20, 100).tolist(), rng.integers(0, 20, 100).tolist()
    assert metrics.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert metrics.answer_scores("The Rhine.", ["rhine"]) == (1.0, 1.0)
    exact, f1 = metrics.answer_scores("upper Rhine", ["Rhine", "Lake Constance"])
    assert (exact, f1) == (0.0, pytest.approx(2 / 3))


def test_a_sure_and_right_classifier_has_no_calibration_error():
    sure = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert metrics.calibration_error(sure, [0, 1]) == 0.0
    assert metrics.calibration_error(sure, [1, 0]) == 1.0


def test_ngram_probabilities_of_all_next_tokens_sum_to_one():
    rng = np.random.default_rng(2)
    stream = rng.integers(0, 6, 400).astype(np.uint16)
    ngrams = metrics.NGrams(stream, order=3, vocab_size=6)
    for history in ([0, 1], [5, 5], [3, 2]):
        total = sum(
            float(np.exp(ngrams.log_probabilities(np.array([*history, token], dtype=np.uint16)))[0])
            for token in range(6)
        )
        assert total == pytest.approx(1.0)
