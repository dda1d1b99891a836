"""`/v1/answer`: answers to questions, from a given context or written.

HTTP only; how answers are found, the tasks know. Runs in the API process, on the event loop.
"""

from functools import partial
from typing import Any, Literal, cast

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.native import encode_options, envelope
from service.api.state import request_state
from service.api.writing import (
    WRITING_FIELDS,
    Opening,
    Texts,
    WritingBody,
    choices_of,
    fault_item,
    raise_if_all_failed,
    refuse,
    settled,
    stream_text,
    truncation,
    usage_of,
    writing_options,
)
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError, UnsupportedParameter
from service.tasks.answering import (
    SAMPLED_TEMPERATURE,
    TASK,
    AnswerEngine,
    Question,
    Read,
    WrittenAnswer,
    answer_prompt,
    assignment,
    choose,
    read_answers,
    write_answer,
)
from service.tasks.instructing import Commission, Spent, Writer, side_by_side
from service.tasks.serial_text import SerialText
from service.tasks.span_answers import SpanOptions

router = APIRouter(prefix="/v1", tags=["answers"])

MAX_SAMPLES = 64
SPAN_FIELDS = ("top_k", "handle_impossible_answer", "max_answer_len", "doc_stride", "max_seq_len", "align_to_words")
GENERATIVE_ONLY = (*WRITING_FIELDS, "samples")


class AnswerBody(WritingBody):
    """Several questions about one context, one question about several, or as many of both, each for itself."""

    question: Texts
    context: Texts | None = None
    method: Literal["auto", "extractive", "generative"] = "auto"
    top_k: int = Field(1, ge=1, le=1000, description="how many answers of a context")
    handle_impossible_answer: bool = False
    max_answer_len: int = Field(15, ge=1, le=512, description="in tokens")
    max_seq_len: int | None = Field(None, ge=8, le=1_000_000, description="tokens of a window, question included")
    doc_stride: int | None = Field(None, ge=0, le=1_000_000, description="tokens that windows share")
    align_to_words: bool = True
    samples: int = Field(1, ge=1, le=MAX_SAMPLES, description="written answers of which the commonest is taken")
    abstain_below: float | None = Field(None, ge=0, le=1, description="no answer where confidence is less")


@router.post("/answer", summary="Answers to questions")
async def create_answer(request: Request, body: AnswerBody) -> Response:
    questions = _questions(body)
    engine = cast(AnswerEngine, request_state(request).engine)
    written = body.context is None or any(name in body.model_fields_set for name in GENERATIVE_ONLY)
    model, method = choose(engine, body.model, body.method, prefers="generative" if written else "extractive")
    if method == "extractive":
        return await _read(request, body, engine, model, questions)
    refuse(body, SPAN_FIELDS, f"is for extractive answers, and {model.name} writes them")
    if body.abstain_below is not None and body.samples == 1:
        message = "abstain_below needs samples: one written answer does not say how sure it is"
        raise UnsupportedParameter(message, param="abstain_below")
    writer = Writer(engine, writing_options(request, body, TASK))
    choices = choices_of(body, temperature=SAMPLED_TEMPERATURE if body.samples > 1 else None)
    commissions = [Commission(model=model, assignment=assignment(entry), choices=choices) for entry in questions]
    if body.stream:
        return _stream(request, body, writer, commissions, questions)
    works = [
        partial(_outcome, writer, commission, question, body)
        for commission, question in zip(commissions, questions, strict=True)
    ]
    outcomes = await until_gone(request, side_by_side(works))
    _raise_if_all_failed(outcomes, body)
    data = [_written_item(index, outcome, body) for index, outcome in enumerate(outcomes)]
    spent = Spent.total(outcome.spent for outcome in outcomes if isinstance(outcome, WrittenAnswer))
    return envelope(request, model, data, usage_of(spent), method=method)


def _questions(body: AnswerBody) -> list[Question]:
    if body.context is None:
        return [Question(text) for text in ([body.question] if isinstance(body.question, str) else body.question)]
    if isinstance(body.question, str):
        contexts = [body.context] if isinstance(body.context, str) else body.context
        return [Question(body.question, context) for context in contexts]
    if isinstance(body.context, str):
        return [Question(text, body.context) for text in body.question]
    if len(body.question) != len(body.context):
        message = f"{len(body.question):,} questions and {len(body.context):,} contexts do not pair up"
        raise InvalidRequest(message, param="context")
    return [Question(text, context) for text, context in zip(body.question, body.context, strict=True)]


async def _read(
    request: Request, body: AnswerBody, engine: AnswerEngine, model: LoadedModel, questions: list[Question]
) -> Response:
    refuse(body, GENERATIVE_ONLY, f"is for written answers, and {model.name} takes them from the context")
    if body.context is None:
        raise InvalidRequest(f"{model.name} takes answers from a context: give one", param="context")
    spans = SpanOptions(**{name: getattr(body, name) for name in SPAN_FIELDS})
    found = await until_gone(
        request, read_answers(engine, model, questions, encode_options(request, body, TASK), spans)
    )
    _raise_if_all_failed([entry.error or entry for entry in found], body)
    data = [_read_item(index, entry, body) for index, entry in enumerate(found)]
    num_tokens = sum(entry.num_tokens for entry in found)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return envelope(request, model, data, usage, method="extractive")


def _stream(
    request: Request, body: AnswerBody, writer: Writer, commissions: list[Commission], questions: list[Question]
) -> Response:
    if not (isinstance(body.question, str) and isinstance(body.context, str | None)):
        raise InvalidRequest("a stream is of one answer: ask the questions of a list one by one", param="stream")
    if body.samples > 1:
        raise UnsupportedParameter("samples are counted when all have come: they are not streamed", param="samples")
    commission = commissions[0]

    async def begin() -> Opening:
        prompt = await answer_prompt(commission, questions[0], truncate=body.truncate)
        text = SerialText(writer, commission.model, [prompt])
        return Opening(text=text, head={"object": "answer.chunk", "method": "generative"})

    return stream_text(request, commission.model, begin)


async def _outcome(
    writer: Writer, commission: Commission, question: Question, body: AnswerBody
) -> WrittenAnswer | ServiceError:
    return await settled(write_answer(writer, commission, question, truncate=body.truncate, samples=body.samples))


def _raise_if_all_failed(outcomes: list[Any], body: AnswerBody) -> None:
    """Names the field that the items are made of."""
    single = isinstance(body.question, str) and isinstance(body.context, str | None)
    for param, given in (("question", body.question), ("context", body.context)):
        errors = [outcome.param for outcome in outcomes if isinstance(outcome, ServiceError)]
        if errors and errors[0] == param:
            raise_if_all_failed(outcomes, param=param, single=single or isinstance(given, str))
    raise_if_all_failed(outcomes, param="question", single=True)


def _read_item(index: int, found: Read, body: AnswerBody) -> dict[str, Any]:
    if found.error is not None:
        return fault_item(index, found.error)
    answers = [
        {"answer": answer.text, "score": answer.score, "start": answer.start, "end": answer.end}
        for answer in found.answers
    ]
    best = answers[0]
    # Found in several windows, an answer has the sum of their scores.
    confidence = min(found.answers[0].score, 1.0)
    abstained = body.abstain_below is not None and confidence < body.abstain_below
    shown = {**best, "answer": None if abstained else best["answer"]}
    return {
        "index": index,
        **shown,
        "confidence": confidence,
        "abstained": abstained,
        "windows": found.num_windows,
        "answers": answers,
    }


def _written_item(index: int, outcome: WrittenAnswer | ServiceError, body: AnswerBody) -> dict[str, Any]:
    if isinstance(outcome, ServiceError):
        return fault_item(index, outcome)
    item: dict[str, Any] = {"index": index, "answer": outcome.text, "finish_reason": outcome.finish_reason}
    ballot = outcome.ballot
    if ballot is not None:
        abstained = body.abstain_below is not None and ballot.agreement < body.abstain_below
        item |= {
            "answer": None if abstained else outcome.text,
            "confidence": ballot.agreement,
            "abstained": abstained,
            "samples": ballot.num_samples,
            "votes": [{"answer": answer, "votes": count} for answer, count in ballot.votes.items()],
        }
    return item | truncation(outcome.spent)
