"""What is said of logits, and how the temperature is fitted and judged."""

import numpy as np
import pytest
from numpy.typing import NDArray

from service.tasks.confidence import entropy, judge, judge_votes, sigmoid, softmax
from service.tasks.temperature import expected_calibration_error, fit_temperature, measure, nll


@pytest.mark.parametrize("logits", [[-95.0, 1.0], [1000.0, -1000.0], [-1e30, 1e30], [-500.0, -501.0], [0.0, 0.0]])
def test_softmax_and_sigmoid_of_any_logits_are_probabilities(logits: list[float]) -> None:
    shares, each = softmax(np.array(logits)), sigmoid(np.array(logits))
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(1.0)
    assert ((each >= 0) & (each <= 1)).all()
    assert each == pytest.approx(1 - sigmoid(-np.array(logits)))


def test_a_judgement_by_hand() -> None:
    found = judge(np.log(np.array([0.2, 0.5, 0.3])), "softmax")
    assert found.order == (1, 2, 0)
    assert found.scores.tolist() == pytest.approx([0.2, 0.5, 0.3])
    assert found.margin == pytest.approx(0.2)
    assert found.entropy == pytest.approx(-(0.2 * np.log(0.2) + 0.5 * np.log(0.5) + 0.3 * np.log(0.3)))
    assert found.confidence == pytest.approx(0.5)


def test_temperature_changes_confidence_and_neither_scores_nor_order() -> None:
    logits = np.array([2.0, 1.0, -1.0])
    plain, tempered = judge(logits, "softmax"), judge(logits, "softmax", 3.0)
    assert tempered.scores.tolist() == plain.scores.tolist()
    assert tempered.order == plain.order
    assert tempered.confidence == pytest.approx(float(softmax(logits / 3).max()))


def test_a_lone_label_is_ahead_of_its_absence() -> None:
    found = judge(np.array([np.log(3.0)]), "sigmoid")
    assert found.confidence == pytest.approx(0.75)
    assert found.margin == pytest.approx(0.5)
    assert found.entropy == pytest.approx(entropy(np.array([0.75, 0.25])))


def test_a_bare_number_has_no_confidence() -> None:
    found = judge(np.array([4.2]), "none")
    assert found.scores.tolist() == [4.2]
    assert (found.margin, found.entropy, found.confidence) == (None, None, None)


def test_equal_scores_stay_in_their_order() -> None:
    assert judge(np.zeros(20), "softmax").order == tuple(range(20))


def test_votes_that_name_nothing_lower_the_agreement() -> None:
    found = judge_votes([1, 3], 8)
    assert found.order == (1, 0)
    assert found.confidence == pytest.approx(3 / 8)
    assert found.margin == pytest.approx(2 / 8)


def one_hot(places: NDArray[np.int64], num_labels: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.eye(num_labels, dtype=np.bool_)[places]
    return found


def test_several_right_labels_of_a_text_and_none_are_as_good_as_one() -> None:
    """Every label but one was taken for wrong, and the fitted temperature made all of them doubtful."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 5)) * 2
    targets = generator.random(logits.shape) < sigmoid(logits)
    assert fit_temperature(logits * 3.0, targets, "sigmoid") == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 4)) * 2
    noise = generator.gumbel(size=logits.shape)
    targets = (logits + noise).argmax(axis=1)  # drawn from softmax(logits)
    assert fit_temperature(logits * temperature, one_hot(targets, 4)) == pytest.approx(temperature, rel=0.05)


def test_a_known_temperature_of_independent_labels_is_recovered() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 1)) * 2
    both = np.concatenate([logits, -logits], axis=1)
    targets = (generator.random(20_000) > sigmoid(logits)[:, 0]).astype(np.int64)
    assert fit_temperature(both * 3.0, one_hot(targets, 2), "sigmoid") == pytest.approx(3.0, rel=0.05)


def test_the_fit_is_no_worse_than_any_temperature_around_it() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(500, 3)) * 4
    targets = one_hot((logits + generator.gumbel(size=logits.shape) * 3).argmax(axis=1), 3)
    best = fit_temperature(logits, targets)
    least = nll(logits, targets, best, "softmax")
    assert all(least <= nll(logits, targets, best * factor, "softmax") + 1e-9 for factor in (0.5, 0.9, 1.1, 2.0))


def test_calibration_error_by_hand() -> None:
    """Bins of width 0.5: 0.2 (wrong) and 0.4 (right) in one, 0.6, 0.8 (right) and 1.0 (wrong) in the other."""
    confidences = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
    correct = np.array([False, True, True, True, False])
    expected = (2 * abs(1 / 2 - 0.3) + 3 * abs(2 / 3 - 0.8)) / 5
    assert expected_calibration_error(confidences, correct, num_bins=2) == pytest.approx(expected)


def test_brier_and_nll_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.3], [0.4, 0.6]]))
    found = measure(logits, one_hot(np.array([0, 0]), 2), 1.0)
    assert found.brier == pytest.approx(((0.3**2 + 0.3**2) + (0.6**2 + 0.6**2)) / 2)
    assert found.nll == pytest.approx(-(np.log(0.7) + np.log(0.4)) / 2)
