"""Has a labelled set answered by one service, or by two, and scores what comes back.

Two services are compared on the items that both answered, with the same draws of the bootstrap. Runs in the
evaluation's process.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service.evaluate.asking import EvaluateError, Fault, Service, Sleep, ask_all
from service.evaluate.kinds import Item, Kind, Options
from service.evaluate.metrics import Estimate, Measure, draws_of, estimate, mcnemar
from service.evaluate.scoring import Found, Scores

MAX_CHANGES = 20


@dataclass(slots=True, kw_only=True)
class Answers:
    """`found[i]` belongs to item i; None where it failed, with the reason in `faults` under the item's line."""

    service: Service
    found: list[Found | None]
    faults: dict[int, str] = field(default_factory=dict)
    model: str = ""
    version: str = ""


@dataclass(slots=True, kw_only=True)
class Evaluation:
    answers: Answers
    scores: Scores
    estimates: dict[str, Estimate]
    num_scored: int


@dataclass(slots=True, kw_only=True)
class Comparison:
    """The second less the first. `flips` are items that one of them has right and the other has not."""

    first: Evaluation
    second: Evaluation
    num_shared: int
    deltas: dict[str, Estimate]
    flips: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    mcnemar_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    num_draws: int = 1000
    seed: int = 0


def read_items(path: Path, kind: Kind, options: Options, limit: int | None = None) -> list[Item]:
    """Raises: EvaluateError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(f"cannot read {path}: {error}") from error
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise EvaluateError(f"not an object with {kind.fields}")
            items.append(kind.item(number, row, options))
        except (ValueError, EvaluateError) as error:
            raise EvaluateError(f"{path}, line {number}: {error}; expected {kind.fields}") from error
        if len(items) == limit:
            break
    if not items:
        raise EvaluateError(f"{path} has no items")
    return items


async def answered(
    service: Service,
    kind: Kind,
    items: Sequence[Item],
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    sleep: Sleep | None = None,
) -> Answers:
    """Raises: EvaluateError; also where not one item was answered."""
    more = {} if sleep is None else {"sleep": sleep}
    raw = await ask_all(service, kind.path, [item.body for item in items], transport=transport, **more)
    answers = Answers(service=service, found=[])
    for item, answer in zip(items, raw, strict=True):
        found = None
        if isinstance(answer, Fault):
            answers.faults[item.line] = f"{answer.status}: {answer.message}"
        else:
            answers.model = answers.model or str(answer.get("model", ""))
            answers.version = answers.version or str(answer.get("model_version") or "")
            found = _found(service, kind, item, answer)
        answers.found.append(found)
    if len(answers.faults) == len(items):
        line, message = next(iter(answers.faults.items()))
        raise EvaluateError(f"{service.name} answered none of {len(items):,} items; line {line}: {message}")
    return answers


def _found(service: Service, kind: Kind, item: Item, answer: dict[str, Any]) -> Found:
    try:
        return kind.find(answer)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        message = f"{service.url}{kind.path} answers in an unknown shape (line {item.line}): {error!r}"
        raise EvaluateError(message) from error


def evaluation(answers: Answers, kind: Kind, items: Sequence[Item], options: Options, how: Bootstrap) -> Evaluation:
    pairs = [(item, found) for item, found in zip(items, answers.found, strict=True) if found is not None]
    scores = kind.score([item.gold for item, _ in pairs], [found for _, found in pairs], options)
    draws = draws_of(len(pairs), how.num_draws, how.seed)
    estimates = {name: estimate(measure, draws, len(pairs)) for name, measure in scores.measures.items()}
    return Evaluation(answers=answers, scores=scores, estimates=estimates, num_scored=len(pairs))


def comparison(
    first: Evaluation, second: Evaluation, kind: Kind, items: Sequence[Item], options: Options, how: Bootstrap
) -> Comparison:
    """Raises: EvaluateError where no item was answered by both."""
    triples = [
        (item, one, other)
        for item, one, other in zip(items, first.answers.found, second.answers.found, strict=True)
        if one is not None and other is not None
    ]
    if not triples:
        raise EvaluateError(f"no item was answered by both {first.answers.service.name} and the other")
    shared = [item for item, _, _ in triples]
    gold = [item.gold for item in shared]
    one = kind.score(gold, [found for _, found, _ in triples], options)
    other = kind.score(gold, [found for _, _, found in triples], options)
    draws = draws_of(len(shared), how.num_draws, how.seed)
    deltas = {
        name: estimate(_less(other.measures[name], measure), draws, len(shared))
        for name, measure in one.measures.items()
        if name in other.measures
    }
    made = Comparison(first=first, second=second, num_shared=len(shared), deltas=deltas)
    predictions = [(found.prediction, newer.prediction) for _, found, newer in triples]
    if one.hits is not None and other.hits is not None:
        gained = other.hits - one.hits
        made.mcnemar_p = mcnemar(int((gained < 0).sum()), int((gained > 0).sum()))
        made.flips = [_change(shared[at], predictions[at], float(gained[at])) for at in np.flatnonzero(gained)]
    elif one.by_item is not None and other.by_item is not None:
        gained = other.by_item - one.by_item
        order = np.argsort(-np.abs(gained), kind="stable")[:MAX_CHANGES]
        made.changes = [_change(shared[at], predictions[at], float(gained[at])) for at in order if gained[at]]
    return made


def _less(second: Measure, first: Measure) -> Measure:
    return lambda at: second(at) - first(at)


def _change(item: Item, predictions: tuple[Any, Any], gained: float) -> dict[str, Any]:
    before, after = predictions
    return {"line": item.line, "gold": item.gold, "before": before, "after": after, "gained": gained}
