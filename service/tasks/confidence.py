"""From logits to what may be said of them: probabilities, margin, entropy, and how sure that makes us.

Scores are what the checkpoint's kind of head means (softmax, sigmoid, or the bare number). Confidence is the best
label's probability at the fitted temperature (arXiv:1706.04599), the same as the score where none was fitted.
Plain numpy; knows no model, no engine and no HTTP. Runs in the API process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.errors import ServiceError

Activation = Literal["softmax", "sigmoid", "none"]
Numbers = NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class Scored:
    """One text's way through a classifier: a logit per label, or what went wrong."""

    logits: Numbers | None = None
    num_tokens: int = 0
    num_truncated: int = 0
    kept_tokens: int = 0
    """Where it was cut: the tokens that the network read."""
    tokenized: float | None = None
    started: float | None = None
    """When its request's first step began, in `time.monotonic()` seconds."""
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`order` lists the labels best first; the rest but `scores` is None where there are no probabilities."""

    scores: Numbers
    order: tuple[int, ...]
    margin: float | None = None
    """How far the best label is ahead of the next; of a lone label, ahead of its absence."""
    entropy: float | None = None
    """In nats; of labels that exclude nothing, the mean of each one's own."""
    confidence: float | None = None


def softmax(logits: Numbers) -> Numbers:
    """The largest logit is taken off first: nothing overflows, however far apart they are."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Numbers = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(logits: Numbers) -> Numbers:
    small = np.exp(-np.abs(logits))
    values: Numbers = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return values


def activated(logits: Numbers, activation: Activation) -> Numbers:
    match activation:
        case "softmax":
            return softmax(logits)
        case "sigmoid":
            return sigmoid(logits)
        case "none":
            return logits


def judge(logits: Numbers, activation: Activation, temperature: float = 1.0) -> Judgement:
    scores = activated(logits, activation)
    order = best_first(scores)
    if activation == "none":
        return Judgement(scores=scores, order=order)
    best = scores[order[0]]
    rest = scores[order[1]] if len(order) > 1 else 1.0 - best
    return Judgement(
        scores=scores,
        order=order,
        margin=float(best - rest),
        entropy=entropy(scores) if activation == "softmax" else _mean_binary_entropy(scores),
        confidence=float(activated(logits / temperature, activation)[order[0]]),
    )


def judge_votes(votes: Sequence[int], num_samples: int) -> Judgement:
    """Shares of all samples, those that named no label included; agreement is the confidence."""
    shares: Numbers = np.asarray(votes, dtype=np.float64) / num_samples
    order = best_first(shares)
    best = float(shares[order[0]])
    rest = float(shares[order[1]]) if len(order) > 1 else 1.0 - best
    return Judgement(scores=shares, order=order, margin=best - rest, entropy=entropy(shares), confidence=best)


def best_first(scores: Numbers) -> tuple[int, ...]:
    """Indices by falling score; equal ones stay in their order."""
    return tuple(np.argsort(-scores, kind="stable").tolist())


def entropy(probabilities: Numbers) -> float:
    positive = probabilities[probabilities > 0]
    return float(max(0.0, -(positive * np.log(positive)).sum()))


def _mean_binary_entropy(scores: Numbers) -> float:
    return float(np.mean([entropy(np.array([score, 1.0 - score])) for score in scores]))
