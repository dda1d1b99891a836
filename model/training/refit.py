"""The last word on a classification head: logistic regression on the states of the finished body.

While body and heads learn together, a head with many labels lags behind; on the finished body its optimum is a convex
problem of seconds. The solution is pulled towards the trained weights; how strongly, and whether it is better at all,
is decided by the log loss of held-back training rows. Runs in the training process.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.finetune import Encoded
from model.training.heads import Head, head_states
from model.training.networks import Bert

Examples = tuple[Tensor, Tensor]
"""States [N, E] and the class of each, [N]."""

Row = TypeVar("Row")

HELD_BACK_EVERY = 20
STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def hold_back(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(learnt from, held back): every twentieth row chooses a head's strength and its temperature."""
    learnt = [row for number, row in enumerate(rows) if number % HELD_BACK_EVERY]
    return learnt, list(rows[::HELD_BACK_EVERY])


def _solve(head: Head, states: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the least log loss plus `strength` times the squared distance to the head's own."""
    old_weight, old_bias = head.weight.detach(), head.bias.detach()
    weight, bias = old_weight.clone().requires_grad_(), old_bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        distance = (weight - old_weight).pow(2).sum() + (bias - old_bias).pow(2).sum()
        loss = F.cross_entropy(F.linear(states, weight, bias), targets) + strength * distance
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def refit_head(network: Bert, head: Head, train: Sequence[Encoded], held_back: Sequence[Encoded]) -> float:
    """`refit` of a classification head on texts."""

    def examples(rows: Sequence[Encoded]) -> Examples:
        return head_states(network, head, [row.ids for row in rows]), torch.tensor([row.target[0] for row in rows])

    return refit(head, examples(train), examples(held_back))


def refit(head: Head, train: Examples, held_back: Examples) -> float:
    """Change the head in place to the best solution on the rows held back; returns its strength, inf if unchanged."""
    (states, targets), (judged, wanted) = train, held_back
    found = {float("inf"): (head.weight.detach().clone(), head.bias.detach().clone())}
    found |= {strength: _solve(head, states, targets, strength) for strength in STRENGTHS}
    losses = {
        strength: float(F.cross_entropy(F.linear(judged, weight, bias), wanted))
        for strength, (weight, bias) in found.items()
    }
    best = min(losses, key=lambda strength: losses[strength])
    with torch.no_grad():
        head.weight.copy_(found[best][0])
        head.bias.copy_(found[best][1])
    return best
