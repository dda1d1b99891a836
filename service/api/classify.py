"""`/v1/classify`: a checkpoint's own labels, or the caller's.

HTTP only; what a score is, and which checkpoint gives it, the tasks know. Runs in the API process, on the event loop.
"""

from collections.abc import Sequence
from typing import Annotated, Any, cast

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.native import (
    MAX_ITEMS,
    MAX_LABELS,
    InputText,
    NativeBody,
    encode_options,
    envelope,
    error_item,
    of_address,
    usage_of,
    written_one_by_one,
)
from service.api.schemas_openai import INT32, INT64, Name
from service.api.state import request_state
from service.errors import InvalidRequest, UnsupportedParameter
from service.tasks.classification import (
    Classification,
    ClassifyEngine,
    LabelsOpen,
    Way,
    choose_for_labels,
    choose_head,
    choose_own,
    classify_by_labels,
    classify_own,
)
from service.tasks.confidence import Judgement, Scored, best_first, judge_votes
from service.tasks.encoding import Text
from service.tasks.label_samples import SampleOptions, Voted, vote_for_labels
from service.tasks.zero_shot import DEFAULT_TEMPLATE, PLACE, LabelSet

router = APIRouter(prefix="/v1", tags=["classification"])

TextPair = Annotated[list[InputText], Field(min_length=2, max_length=2)]
Label = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"\S")]


def _kind_of_input(value: object) -> str:
    """Which of the input's types is meant, so that a fault is one of that type and not of all three."""
    if not isinstance(value, list):
        return "text"
    return "pairs" if value and isinstance(value[0], list) else "texts"


Inputs = Annotated[
    Annotated[InputText, Tag("text")]
    | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")]
    | Annotated[list[TextPair], Field(min_length=1, max_length=MAX_ITEMS), Tag("pairs")],
    Discriminator(_kind_of_input),
]


class ClassifyBody(NativeBody):
    """`input` is a text, a list of texts, or a list of pairs (each a list of two)."""

    input: Inputs
    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS)] | None = None
    head: Name | None = Field(None, description="one of the small heads that a checkpoint carries")
    multi_label: bool = Field(False, description="the labels do not exclude each other")
    hypothesis_template: Annotated[str, Field(max_length=4096)] = DEFAULT_TEMPLATE
    top_k: int | None = Field(None, ge=1, le=INT32)
    abstain_below: float | None = Field(None, ge=0, le=1, description="no label where confidence is less")
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    samples: int | None = Field(None, ge=1, le=64, description="a vote of so many samples of a causal LM")
    temperature: float = Field(1.0, ge=0, le=2, description="of the samples")
    seed: int | None = Field(None, ge=-INT64, lt=INT64)


@router.post("/classify", summary="Labels of texts, with how sure they are")
async def create_classification(request: Request, body: ClassifyBody) -> Response:
    if body.samples is not None:
        return await _create_by_vote(request, body, body.samples)
    _refuse(body, ("temperature", "seed"), "goes with samples: nothing is drawn without them")
    engine = classify_engine(request)
    options = encode_options(request, body, "classify")
    if body.labels is not None:
        labels = _label_set(body, body.labels)
        way = choose_for_labels(engine, body.model)
        work = classify_by_labels(engine, way, _texts_alone(body), labels, options)
    else:
        _refuse(body, ("multi_label", "hypothesis_template"), "goes with labels: the checkpoint's own are as trained")
        way = own_way(engine, body.model, body.head)
        work = classify_own(engine, way, _texts(body), options)
    found = await until_gone(request, work)
    check_abstention(found, body.abstain_below)
    raise_if_all_failed(found.scored, single=isinstance(body.input, str))
    data = written_one_by_one(_item(index, found, entry, body) for index, entry in enumerate(found.scored))
    more = {"method": way.method, "activation": found.activation}
    return envelope(request, way.model, data, usage_of(found.scored), **more)


async def _create_by_vote(request: Request, body: ClassifyBody, n: int) -> Response:
    if body.labels is None:
        raise InvalidRequest("samples are of labels that the request names: give `labels`", param="labels")
    _refuse(body, ("raw_scores", "multi_label"), "does not go with samples: each of them names one label")
    _refuse(body, ("truncate",), "does not go with samples: a text must fit whole")
    engine = classify_engine(request)
    labels, texts = _label_set(body, body.labels), _texts_alone(body)
    model = choose_for_labels(engine, body.model, ("self_consistency",)).model
    sampling = SampleOptions(
        n=n,
        temperature=body.temperature,
        seed=body.seed,
        grammar_timeout=request_state(request).settings.grammar_timeout,
    )
    options = encode_options(request, body, "classify")
    voted = await until_gone(request, vote_for_labels(engine, model, texts, labels, options, sampling))
    raise_if_all_failed(voted, single=isinstance(body.input, str))
    data = [_voted_item(index, entry, labels, body) for index, entry in enumerate(voted)]
    num_prompt = sum(entry.num_prompt_tokens for entry in voted)
    num_output = sum(entry.num_output_tokens for entry in voted)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
    return envelope(request, model, data, usage, method="self_consistency", samples=n)


def own_way(engine: ClassifyEngine, name: str | None, head: str | None) -> Way:
    """By the checkpoint's own labels: those of the head that is named, or of the only one that it was made with."""
    return choose_own(engine, name) if head is None else choose_head(engine, name, head)


def way_of_address(request: Request, engine: ClassifyEngine, name: str | None) -> Way:
    """The same for shapes in which a head has its place in the address alone."""
    try:
        return own_way(engine, name, of_address(request, "head"))
    except LabelsOpen as error:
        raise in_address(request, error) from None


def in_address(request: Request, error: LabelsOpen) -> InvalidRequest:
    """What a caller can do whose body has no place for a head, nor for labels."""
    if error.heads:
        advice = f"; name it in the address: {request.url.path}?head={error.heads[0]}"
        return InvalidRequest(error.question + advice, param="head")
    return InvalidRequest(f"{error.question}; those of the caller go to /v1/classify", param="model")


def classify_engine(request: Request) -> ClassifyEngine:
    return cast(ClassifyEngine, request_state(request).engine)


def _texts(body: ClassifyBody) -> list[Text]:
    if isinstance(body.input, str):
        return [body.input]
    return [entry if isinstance(entry, str) else (entry[0], entry[1]) for entry in body.input]


def _texts_alone(body: ClassifyBody) -> list[str]:
    texts = [text for text in _texts(body) if isinstance(text, str)]
    if not texts:
        message = "pairs are for a checkpoint's own labels; with `labels` each text is paired with each of them"
        raise InvalidRequest(message, param="input")
    return texts


def _label_set(body: ClassifyBody, labels: list[str]) -> LabelSet:
    if body.head is not None:
        raise InvalidRequest("labels and head exclude each other", param="head")
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise InvalidRequest(f"the label '{label[:64]}' is there twice", param=f"labels.{index}")
    if body.hypothesis_template.count(PLACE) != 1:
        message = "hypothesis_template needs one {} where the label goes"
        raise InvalidRequest(message, param="hypothesis_template")
    return LabelSet(labels=tuple(labels), template=body.hypothesis_template, multi_label=body.multi_label)


def _refuse(body: ClassifyBody, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if name in body.model_fields_set:
            raise UnsupportedParameter(f"{name} {reason}", param=name)


def check_abstention(found: Classification, abstain_below: float | None) -> None:
    if abstain_below is not None and found.activation == "none":
        message = f"{found.way.model.name} gives a number and no probability: there is no confidence to abstain by"
        raise UnsupportedParameter(message, param="abstain_below")


def raise_if_all_failed(entries: Sequence[Scored | Voted], *, single: bool) -> None:
    """A lone text's error is the request's; in a list each error stays with its text, unless nothing is left."""
    error = entries[0].error
    if error is not None and all(entry.error is not None for entry in entries):
        error.param = "input" if single else "input.0"
        raise error


def certainty(judgement: Judgement, calibrated: bool, abstain_below: float | None) -> dict[str, Any]:
    """What every judged item says of itself beside its labels."""
    confidence = judgement.confidence
    return {
        "margin": judgement.margin,
        "entropy": judgement.entropy,
        "confidence": confidence,
        "calibrated": calibrated,
        "abstained": abstain_below is not None and confidence is not None and confidence < abstain_below,
    }


def truncation(entry: Scored) -> dict[str, Any]:
    return {"truncated": True, "kept_tokens": entry.kept_tokens} if entry.num_truncated else {}


def _item(index: int, found: Classification, entry: Scored, body: ClassifyBody) -> dict[str, Any]:
    if entry.error is not None:
        return {"index": index, "error": error_item(entry.error)}
    assert entry.logits is not None
    judgement = found.judge(entry)
    scores = entry.logits if body.raw_scores else judgement.scores
    order = best_first(scores)
    labels = [{"label": found.labels[place], "score": float(scores[place])} for place in order]
    certain = certainty(judgement, found.calibrated, body.abstain_below)
    return {
        "index": index,
        "label": None if certain["abstained"] else labels[0]["label"],
        "score": labels[0]["score"],
        "labels": labels[: body.top_k],
        **certain,
        **truncation(entry),
    }


def _voted_item(index: int, entry: Voted, labels: LabelSet, body: ClassifyBody) -> dict[str, Any]:
    if entry.error is not None:
        return {"index": index, "error": error_item(entry.error)}
    assert entry.ballot is not None
    votes = entry.ballot.votes
    judgement = judge_votes([votes.get(label, 0) for label in labels.labels], entry.ballot.num_samples)
    rows = [{"label": labels.labels[place], "score": float(judgement.scores[place])} for place in judgement.order]
    certain = certainty(judgement, False, body.abstain_below)
    return {
        "index": index,
        "label": None if certain["abstained"] or not votes else rows[0]["label"],
        "score": entry.ballot.agreement,
        "labels": rows[: body.top_k],
        "votes": votes,
        **certain,
    }
