"""Fits the one number that makes a classifier's confidence mean what it says, and measures how far it did.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599): logits divided by T, with T chosen for the least negative
log-likelihood on labelled examples. ECE, Brier score and NLL tell the difference. Plain numpy; no model, no HTTP.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.tasks.confidence import Numbers, sigmoid, softmax

Targets = NDArray[np.bool_]
"""[N, L]: which labels are right; of labels that exclude each other one in each row."""
NUM_BINS = 15
LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures looked at; all that is outside has nothing to do with over- or underconfidence."""
GOLDEN = (5**0.5 - 1) / 2
NUM_STEPS = 60
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Fit:
    """How well probabilities at a temperature fit the labels."""

    ece: float
    brier: float
    nll: float


def nll(logits: Numbers, targets: Targets, temperature: float, activation: Literal["softmax", "sigmoid"]) -> float:
    """Mean negative log-likelihood of the right labels: logits and targets [N, L]; of sigmoids, of all L answers."""
    probabilities = _probabilities(logits, temperature, activation)
    right = np.log(np.maximum(probabilities, TINY))
    wrong = np.zeros_like(right) if activation == "softmax" else np.log(np.maximum(1.0 - probabilities, TINY))
    return float(-np.where(targets, right, wrong).sum(axis=1).mean())


def fit_temperature(logits: Numbers, targets: Targets, activation: Literal["softmax", "sigmoid"] = "softmax") -> float:
    """The temperature of the least negative log-likelihood, by golden-section search over its logarithm.

    In the inverse of T the loss is convex, so there is one minimum to be found.
    """
    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(NUM_STEPS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        if nll(logits, targets, float(np.exp(left)), activation) < nll(
            logits, targets, float(np.exp(right)), activation
        ):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def measure(
    logits: Numbers, targets: Targets, temperature: float, activation: Literal["softmax", "sigmoid"] = "softmax"
) -> Fit:
    probabilities = _probabilities(logits, temperature, activation)
    return Fit(
        ece=expected_calibration_error(probabilities.max(axis=1), are_right(logits, targets)),
        brier=float(((probabilities - targets) ** 2).sum(axis=1).mean()),
        nll=nll(logits, targets, temperature, activation),
    )


def are_right(logits: Numbers, targets: Targets) -> NDArray[np.bool_]:
    """Whether the best label of each row is right: what a confidence is about."""
    right: NDArray[np.bool_] = targets[np.arange(len(targets)), logits.argmax(axis=1)]
    return right


def expected_calibration_error(confidences: Numbers, correct: NDArray[np.bool_], num_bins: int = NUM_BINS) -> float:
    """The mean distance of confidence and accuracy, in bins of equal width, weighted by what is in them.

    Worked example, two bins: confidences 0.6, 0.8, 0.9 of which the first two are right: |2/3 - 2.3/3| = 0.1.
    """
    bins = np.minimum((confidences * num_bins).astype(np.int64), num_bins - 1)
    gaps = 0.0
    for index in np.unique(bins):
        inside = bins == index
        gaps += abs(float(correct[inside].mean()) - float(confidences[inside].mean())) * int(inside.sum())
    return gaps / len(confidences)


def _probabilities(logits: Numbers, temperature: float, activation: Literal["softmax", "sigmoid"]) -> Numbers:
    scaled = logits / temperature
    return softmax(scaled) if activation == "softmax" else sigmoid(scaled)
