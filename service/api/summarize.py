"""`/v1/summarize`: a text in short, written anew or in its own sentences.

HTTP only; how summaries are made, the tasks know. Runs in the API process, on the event loop.
"""

from functools import partial
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.native import encode_options, envelope
from service.api.schemas_openai import INT32
from service.api.state import request_state
from service.api.writing import (
    WRITING_FIELDS,
    Opening,
    Texts,
    WritingBody,
    choices_of,
    fault_item,
    one_alone,
    raise_if_all_failed,
    refuse,
    settled,
    stream_text,
    truncation,
    usage_of,
    writing_options,
)
from service.engine.models import LoadedModel
from service.errors import ServiceError
from service.tasks.extractive_summaries import extract
from service.tasks.instructing import Commission, Spent, Writer, side_by_side
from service.tasks.summarization import TASK, Method, Summarizer, SummaryEngine, assignment, choose
from service.tasks.summary_shape import Shape, Style, Summary

router = APIRouter(prefix="/v1", tags=["summaries"])

ABSTRACTIVE_ONLY = (*(name for name in WRITING_FIELDS if name != "max_tokens"), "top_k")


class SummarizeBody(WritingBody):
    """What is longer than the context is summarized piece by piece; with `truncate` only what fits is read."""

    input: Texts
    method: Literal["auto", "abstractive", "extractive"] = "auto"
    max_sentences: Annotated[int, Field(ge=1, le=1000)] | None = None
    style: Style = "paragraph"
    top_k: int | None = Field(None, ge=0, le=INT32, description="of sampling; 0: off")


@router.post("/summarize", summary="A text in short")
async def create_summary(request: Request, body: SummarizeBody) -> Response:
    engine = cast(SummaryEngine, request_state(request).engine)
    model, method = choose(engine, body.model, body.method)
    shape = Shape(style=body.style, max_sentences=body.max_sentences)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if method == "extractive":
        refuse(body, ABSTRACTIVE_ONLY, f"is for abstractive summaries, and {model.name} makes extractive ones")
        options = encode_options(request, body, TASK)
        work = extract(engine, model, texts, options, shape=shape, max_tokens=body.max_tokens)
        return _answer(request, body, model, method, await until_gone(request, work))
    commission = Commission(
        model=model, assignment=assignment(shape), choices=choices_of(body, sampled_top_k=body.top_k)
    )
    summarizer = Summarizer(Writer(engine, writing_options(request, body, TASK)), commission, shape)
    if body.stream:
        return _stream(request, body, summarizer, commission)
    works = [partial(_outcome, summarizer, text, body.truncate) for text in texts]
    outcomes = await until_gone(request, side_by_side(works))
    return _answer(request, body, model, method, outcomes)


async def _outcome(summarizer: Summarizer, text: str, truncate: bool) -> Summary | ServiceError:
    return await settled(summarizer.summarize(text, truncate=truncate))


def _stream(request: Request, body: SummarizeBody, summarizer: Summarizer, commission: Commission) -> Response:
    text = one_alone(body.input)
    refuse(body, ("max_sentences",), "is for whole summaries: it cannot be kept to in a stream")
    if commission.is_sequence_to_sequence and body.style != "paragraph":
        refuse(body, ("style",), "is for whole summaries: this checkpoint's own are in paragraphs")

    async def begin() -> Opening:
        prompt, summary = await summarizer.begin(text, truncate=body.truncate)
        head = {"object": "summary.chunk", "method": "abstractive", "pieces": summary.num_pieces}
        return Opening(text=summarizer.start(prompt), head=head, before=summary.spent)

    return stream_text(request, commission.model, begin)


def _answer(
    request: Request,
    body: SummarizeBody,
    model: LoadedModel,
    method: Method,
    outcomes: list[Summary | ServiceError],
) -> Response:
    raise_if_all_failed(outcomes, param="input", single=isinstance(body.input, str))
    data = [_item(index, outcome) for index, outcome in enumerate(outcomes)]
    spent = Spent.total(outcome.spent for outcome in outcomes if isinstance(outcome, Summary))
    return envelope(request, model, data, usage_of(spent), method=method)


def _item(index: int, outcome: Summary | ServiceError) -> dict[str, Any]:
    if isinstance(outcome, ServiceError):
        return fault_item(index, outcome)
    item: dict[str, Any] = {"index": index, "summary": outcome.text, "finish_reason": outcome.finish_reason}
    if outcome.sentences:
        item["sentences"] = [
            {"text": sentence.text, "start": sentence.start, "end": sentence.end, "score": sentence.score}
            for sentence in outcome.sentences
        ]
    if outcome.num_pieces > 1:
        item["pieces"] = outcome.num_pieces
    return item | truncation(outcome.spent)
