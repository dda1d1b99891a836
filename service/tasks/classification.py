"""Classification: which checkpoint answers in which way, and its logits for every text.

In order of preference: a checkpoint's own head; for labels that the caller names, an NLI checkpoint, a causal LM, an
embedding checkpoint, a small causal LM. What each way costs and means is in `zero_shot` and `label_likelihood`; what
may be said of the logits, in `confidence`. Knows neither HTTP nor torch. Runs in the API process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from model.description import CheckpointDescription
from service.engine.models import LoadedModel, ModelDirectory
from service.errors import InvalidRequest, ModelNotFound, TaskNotSupported
from service.tasks.confidence import Activation, Judgement, Scored, judge
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions, Text, run_texts, tokenize
from service.tasks.generation import GenerationEngine
from service.tasks.label_likelihood import by_likelihood
from service.tasks.zero_shot import LabelSet, by_entailment, by_similarity, entailment_id

Method = Literal["classifier", "head", "nli", "likelihood", "similarity", "self_consistency"]

LABEL_METHODS: tuple[Method, ...] = ("nli", "likelihood", "similarity")
"""For labels that the caller names, best first."""
MAX_PAIRS = 16_384
"""Texts times labels of one request."""


class ClassifyEngine(EncodeEngine, GenerationEngine, Protocol):
    @property
    def models(self) -> ModelDirectory: ...

    def resolve(self, name: str | None, task: str) -> LoadedModel: ...


def calibration_kind(method: str, *, head: str, labels: LabelSet | None) -> str:
    if labels is not None:
        return f"{method}/{labels.digest}"
    return f"head/{head}" if head else method


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A checkpoint and how it is to classify; `head` names a task head, `labels` are the caller's."""

    model: LoadedModel
    method: Method
    head: str = ""
    labels: LabelSet | None = None

    @property
    def kind(self) -> str:
        """Under which name its calibration is kept."""
        return calibration_kind(self.method, head=self.head, labels=self.labels)

    @property
    def temperature(self) -> float | None:
        """Fitted for this way; None where nobody has."""
        description = self.model.description
        own = description.heads[self.head].temperature if self.head else None
        return description.calibration.temperature.get(self.kind, own)


@dataclass(slots=True, kw_only=True)
class Classification:
    """What a way gave: `scored` text by text, their logits in the order of `labels`."""

    way: Way
    labels: tuple[str, ...]
    activation: Activation
    scored: list[Scored] = field(default_factory=list)

    def judge(self, entry: Scored) -> Judgement:
        assert entry.logits is not None
        temperature = self.way.temperature
        return judge(entry.logits, self.activation, 1.0 if temperature is None else temperature)

    @property
    def calibrated(self) -> bool:
        return self.way.temperature is not None and self.activation != "none"


def can(description: CheckpointDescription, method: Method) -> bool:
    """Whether a checkpoint classifies in that way."""
    match method:
        case "classifier":
            return description.head in ("sequence_classification", "cross_encoder") and bool(description.labels)
        case "head":
            return any(config.kind == "classification" for config in description.heads.values())
        case "nli":
            return description.head == "sequence_classification" and entailment_id(description.labels) is not None
        case "likelihood":
            return description.network == "decoder" and description.head == "language_model"
        case "self_consistency":  # of encoder-decoders those that were trained to be asked
            asked = description.network == "decoder" or "answer" in description.tasks
            return asked and description.head == "language_model"
        case "similarity":
            return description.head == "embedding"


class LabelsOpen(InvalidRequest):
    """The checkpoint has labels once one of its heads is named; without `heads`, only such as the caller gives."""

    def __init__(self, question: str, heads: Sequence[str] = ()) -> None:
        advice = "(or give `labels` of your own)" if heads else "give `labels`"
        super().__init__(f"{question}{' ' if heads else ': '}{advice}", param="head" if heads else "labels")
        self.question = question
        self.heads = heads


def choose_own(engine: ClassifyEngine, name: str | None) -> Way:
    """The checkpoint whose own labels are asked for: one made to classify before one made to rank.

    Raises: ModelNotFound, TaskNotSupported; LabelsOpen where a head or labels of the caller's are all that is missing.
    """
    if name is not None:
        model = engine.models.named(name)
        if not can(model.description, "classifier"):
            raise _without_labels(engine, model)
        return Way(model=model, method="classifier")
    able = [model for model in engine.models.offered() if can(model.description, "classifier")]
    able.sort(key=lambda model: model.description.head != "sequence_classification")
    if able:
        return Way(model=able[0], method="classifier")
    for model in engine.models.offered():
        if heads := head_names(model.description):
            raise LabelsOpen(_which_head(model, heads), heads)
    if any(can(model.description, method) for model in engine.models.offered() for method in LABEL_METHODS):
        raise LabelsOpen("no loaded checkpoint has labels of its own")
    raise ModelNotFound("no loaded checkpoint can do 'classify'", param="model")


def choose_head(engine: ClassifyEngine, name: str | None, head: str) -> Way:
    """The checkpoint that has a task head of that name."""
    models = [engine.models.named(name)] if name is not None else engine.models.offered()
    for model in models:
        config = model.description.heads.get(head)
        if config is not None and config.kind == "classification":
            return Way(model=model, method="head", head=head)
    known = sorted({name for model in models for name in head_names(model.description)})
    owner = models[0].name if name is not None else "a loaded checkpoint"
    raise InvalidRequest(f"{owner} has no head '{head}'; there are: {', '.join(known) or 'none'}", param="head")


def choose_for_labels(engine: ClassifyEngine, name: str | None, methods: Sequence[Method] = LABEL_METHODS) -> Way:
    """The first way in which the named checkpoint, or any, can tell labels apart that it has not been trained on."""
    if name is not None:
        model = engine.models.named(name)
        for method in methods:
            if can(model.description, method):
                return Way(model=model, method=method)
        raise _not_for_labels(engine, model, methods)
    if ways := ways_for_labels(engine.models.offered(), methods):
        return ways[0]
    raise ModelNotFound("no loaded checkpoint can classify by labels of the caller's", param="model")


def ways_for_labels(models: Sequence[LoadedModel], methods: Sequence[Method] = LABEL_METHODS) -> list[Way]:
    """Every way to tell labels apart that the caller names, best first; what a small language model makes of them is
    last."""
    ways = [Way(model=model, method=method) for method in methods for model in models if can(model.description, method)]
    return sorted(ways, key=lambda way: way.method == "likelihood" and way.model.description.small)


def head_names(description: CheckpointDescription) -> list[str]:
    return [name for name, config in description.heads.items() if config.kind == "classification"]


def own_labels(way: Way) -> tuple[tuple[str, ...], Activation]:
    """The labels of a head and what its logits mean, by the text classification pipeline's rules."""
    description = way.model.description
    config = description.heads[way.head] if way.head else description
    if config.problem_type == "regression":
        return config.labels, "none"
    if config.problem_type == "multi_label_classification" or len(config.labels) == 1:
        return config.labels, "sigmoid"
    return config.labels, "softmax"


async def classify_own(
    engine: ClassifyEngine, way: Way, texts: Sequence[Text], options: EncodeOptions
) -> Classification:
    """By the checkpoint's own head, or one of its task heads; a pair is read as one input."""
    labels, activation = own_labels(way)
    trained_length = way.model.description.heads[way.head].max_length if way.head else None
    encoded = await tokenize(way.model, texts, room=options.room(max_tokens=trained_length))
    await run_texts(engine, way.model, encoded, "logits", options, head=way.head)
    scored = [_scored(text) for text in encoded]
    return Classification(way=way, labels=labels, activation=activation, scored=scored)


async def classify_by_labels(
    engine: ClassifyEngine, way: Way, texts: Sequence[str], labels: LabelSet, options: EncodeOptions
) -> Classification:
    """By labels that the caller names, in the way that was chosen for them."""
    if len(texts) * len(labels.labels) > MAX_PAIRS:
        raise InvalidRequest(
            f"{len(texts):,} texts with {len(labels.labels):,} labels make {len(texts) * len(labels.labels):,} pairs; "
            f"the limit is {MAX_PAIRS:,}",
            param="labels",
        )
    match way.method:
        case "nli":
            scored = await by_entailment(engine, way.model, texts, labels, options)
        case "likelihood":
            scored = await by_likelihood(engine, way.model, texts, labels, options)
        case _:
            scored = await by_similarity(engine, way.model, texts, labels, options)
    way = replace(way, labels=labels)
    return Classification(way=way, labels=labels.labels, activation=labels.activation, scored=scored)


def _scored(text: EncodedText) -> Scored:
    return Scored(
        logits=None if text.values is None else text.values.astype(np.float64),
        num_tokens=text.num_tokens,
        num_truncated=text.num_truncated,
        kept_tokens=text.num_tokens,
        tokenized=text.tokenized,
        started=text.started,
        error=text.error,
    )


def _without_labels(engine: ClassifyEngine, model: LoadedModel) -> InvalidRequest:
    heads = head_names(model.description)
    if heads:
        return LabelsOpen(_which_head(model, heads), heads)
    if any(can(model.description, method) for method in LABEL_METHODS):
        return LabelsOpen(f"model '{model.name}' has no labels of its own")
    return _unable(engine, model, "classify", ("classifier",))


def _which_head(model: LoadedModel, heads: Sequence[str]) -> str:
    return f"which head of {model.name}? it has: {', '.join(heads)}"


def _not_for_labels(engine: ClassifyEngine, model: LoadedModel, methods: Sequence[Method]) -> InvalidRequest:
    if can(model.description, "classifier"):
        own = ", ".join(model.description.labels[:8])
        return InvalidRequest(f"model '{model.name}' has its own labels ({own}): leave `labels` out", param="labels")
    return _unable(engine, model, "classify by labels", methods)


def _unable(engine: ClassifyEngine, model: LoadedModel, what: str, methods: Sequence[Method]) -> TaskNotSupported:
    able = [
        other.name for other in engine.models.offered() if any(can(other.description, method) for method in methods)
    ]
    others = f"; that is done by: {', '.join(able)}" if able else ""
    message = f"model '{model.name}' cannot {what}, it can do: {', '.join(model.tasks)}{others}"
    if model.description.head == "token_classification":
        message += " (it labels each token, not the text)"
    return TaskNotSupported(message, param="model")
