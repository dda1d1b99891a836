"""Self-consistency: several seeded samples of one prompt, and the answer that most of them give (arXiv:2203.11171).

The samples share the prompt's KV blocks. All of them are read to their end, also when the leader cannot be overtaken
any more: otherwise the votes would depend on which sample happened to come first. Used for labels and for answers;
knows neither HTTP nor what the texts mean. Runs in the API process.
"""

import re
import string
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from service.engine.models import LoadedModel
from service.tasks.generation import GenerationEngine, Prompt, RequestOptions, Usage, start_generation

ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """`votes` by answer as it was first given, most first; `agreement` is the winner's share of all samples."""

    winner: str | None
    votes: dict[str, int]
    agreement: float
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The texts in the order of their seeds, why each ended, and what they cost together."""

    texts: list[str]
    finish_reasons: list[str]
    usage: Usage


async def sample(
    engine: GenerationEngine, model: LoadedModel, prompt: Prompt, options: RequestOptions, *, n: int
) -> Samples:
    """n continuations, the first with the prompt's own seed. Raises what the engine raises; then all are cancelled."""
    generation = start_generation(engine, model, [prompt], options, n=n)
    texts, reasons = [""] * n, [""] * n
    try:
        async with aclosing(aiter(generation)) as deltas:
            async for delta in deltas:
                texts[delta.index] += delta.text
                reasons[delta.index] = delta.finish_reason or reasons[delta.index]
    finally:
        generation.close()
    return Samples(texts=texts, finish_reasons=reasons, usage=generation.usage)


def normalized(answer: str) -> str:
    """As SQuAD compares answers; one of punctuation or articles alone is compared as it is."""
    lowered = answer.lower()
    bare = ARTICLES.sub(" ", "".join(char for char in lowered if char not in string.punctuation))
    return " ".join(bare.split()) or " ".join(lowered.split())


def vote(answers: Sequence[str | None], same: Callable[[str], str] = normalized) -> Ballot:
    """Counts answers that `same` makes equal, by default whatever their case, articles, punctuation and spaces.

    None is an abstention.

    Worked example: ["Paris", "the paris.", "Rome", None] gives Paris 2 of 4: agreement 0.5. Of equals the one that was
    given first wins.
    """
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is None:
            continue
        name = names.setdefault(same(answer), answer)
        counts[name] = counts.get(name, 0) + 1
    votes = dict(sorted(counts.items(), key=lambda entry: -entry[1]))
    winner = next(iter(votes), None)
    agreement = votes[winner] / len(answers) if winner is not None else 0.0
    return Ballot(winner=winner, votes=votes, agreement=agreement, num_samples=len(answers))
