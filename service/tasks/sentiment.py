"""Sentiment: whatever a checkpoint's labels are, what they come to as positive, neutral and negative.

In order of preference: a checkpoint whose labels speak of sentiment (its own head, or a task head named `sentiment`),
then NLI, a causal LM, an embedding checkpoint, a small causal LM with those three words as labels, and last a
classifier whose labels have no names, which is a guess. A checkpoint that the caller names is read in the first of
these ways that it can. Knows neither HTTP nor torch. Runs in the API process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.sentiment_labels import unnamed_valences, valences
from service.engine.models import LoadedModel
from service.errors import ModelNotFound, TaskNotSupported
from service.tasks.classification import (
    LABEL_METHODS,
    Classification,
    ClassifyEngine,
    Way,
    can,
    classify_by_labels,
    classify_own,
    own_labels,
    ways_for_labels,
)
from service.tasks.confidence import Judgement, Numbers, Scored, activated, best_first, entropy
from service.tasks.encoding import EncodeOptions
from service.tasks.zero_shot import LabelSet

CLASSES = ("positive", "neutral", "negative")
HEAD = "sentiment"
TEMPLATE = "The sentiment of this text is {}."


@dataclass(frozen=True, slots=True, kw_only=True)
class SentimentWay:
    """A way to classify, and the valence of each of its labels."""

    way: Way
    valences: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentiment:
    """`judgement` is over the three classes, in the order of `CLASSES`; `polarity` is the mean valence, -1 to 1."""

    judgement: Judgement
    polarity: float


def choose(engine: ClassifyEngine, name: str | None) -> SentimentWay:
    """The way that is best for the named checkpoint, or of all.

    Raises: ModelNotFound, TaskNotSupported.
    """
    models = [engine.models.named(name)] if name is not None else engine.models.offered()
    found = _trained(models) or _by_words(models) or _unnamed(models)
    if found is not None:
        return found
    if name is None:
        raise ModelNotFound("no loaded checkpoint can do 'sentiment'", param="model")
    others = [model.name for model in engine.models.offered() if _trained([model]) or _by_words([model])]
    advice = f"; 'sentiment' is done by: {', '.join(others)}" if others else ""
    tasks = ", ".join(models[0].tasks)
    raise TaskNotSupported(f"model '{name}' cannot do 'sentiment', it can do: {tasks}{advice}", param="model")


def _trained(models: Sequence[LoadedModel]) -> SentimentWay | None:
    for model in models:
        for way in (Way(model=model, method="classifier"), Way(model=model, method="head", head=HEAD)):
            config = model.description.heads.get(HEAD)
            exists = config is not None and config.kind == "classification"
            if not (exists if way.head else can(model.description, "classifier")):
                continue
            labels, activation = own_labels(way)
            found = valences(labels) if activation != "none" else None
            if found is not None:
                return SentimentWay(way=way, valences=found)
    return None


def _by_words(models: Sequence[LoadedModel]) -> SentimentWay | None:
    ways = ways_for_labels(models)
    return SentimentWay(way=ways[0], valences=(1.0, 0.0, -1.0)) if ways else None


def _unnamed(models: Sequence[LoadedModel]) -> SentimentWay | None:
    for model in models:
        way = Way(model=model, method="classifier")
        if can(model.description, "classifier") and own_labels(way)[1] != "none":
            found = unnamed_valences(model.description.labels)
            if found is not None:
                return SentimentWay(way=way, valences=found)
    return None


async def classify_sentiment(
    engine: ClassifyEngine, chosen: SentimentWay, texts: Sequence[str], options: EncodeOptions
) -> Classification:
    """The logits of the checkpoint's own labels; `sentiment_of` says what they come to."""
    if chosen.way.method in LABEL_METHODS:
        return await classify_by_labels(engine, chosen.way, texts, LabelSet(labels=CLASSES, template=TEMPLATE), options)
    return await classify_own(engine, chosen.way, texts, options)


def sentiment_of(found: Classification, entry: Scored, valences: Sequence[float]) -> Sentiment:
    """Each label's probability goes to the class of its valence; a checkpoint without a neutral label gives it 0.

    Labels that do not exclude each other are brought to a sum of 1 first.
    """
    assert entry.logits is not None
    temperature = found.way.temperature
    probabilities = _shares(activated(entry.logits, found.activation))
    tempered = _shares(activated(entry.logits / (1.0 if temperature is None else temperature), found.activation))
    scores = _by_class(probabilities, valences)
    order = best_first(scores)
    judgement = Judgement(
        scores=scores,
        order=order,
        margin=float(scores[order[0]] - scores[order[1]]),
        entropy=entropy(scores),
        confidence=float(_by_class(tempered, valences)[order[0]]),
    )
    return Sentiment(judgement=judgement, polarity=float(np.clip(probabilities @ np.asarray(valences), -1.0, 1.0)))


def _shares(values: Numbers) -> Numbers:
    shares: Numbers = values / max(float(values.sum()), np.finfo(np.float64).tiny)
    return shares


def _by_class(probabilities: Numbers, valences: Sequence[float]) -> Numbers:
    signs = np.sign(np.asarray(valences))
    return np.array([float(probabilities[signs == sign].sum()) for sign in (1, 0, -1)])
