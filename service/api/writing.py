"""What the endpoints share whose answers may be written by a checkpoint: decoding fields, token accounts, streams.

HTTP only: what is written, the tasks know. Runs in the API process, on the event loop.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from model.generation_defaults import Choices
from service.api.answers_openai import DONE
from service.api.event_stream import EventStream
from service.api.generating import deadline_of, first_of, priority_of, quiet_seconds
from service.api.native import MAX_ITEMS, NativeBody, error_item, note
from service.api.schemas_openai import INT32, INT64, Count
from service.api.state import request_record
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError, UnsupportedParameter
from service.tasks.generation import Delta, RequestOptions
from service.tasks.instructing import Spent
from service.tasks.sampling import seed_of
from service.tasks.serial_text import SerialText

T = TypeVar("T")

MAX_BEAMS = 32
FilledText = Annotated[str, Field(min_length=1, max_length=2_000_000, pattern=r"\S")]
Texts = Annotated[
    Annotated[FilledText, Tag("text")]
    | Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]


class WritingBody(NativeBody):
    """How a text is to be written; what is left out is as the checkpoint wants it (LMs: greedy)."""

    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    min_tokens: Count | None = None
    num_beams: int | None = Field(None, ge=1, le=MAX_BEAMS)
    length_penalty: float | None = Field(None, ge=-5, le=5)
    early_stopping: bool | Literal["never"] | None = None
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1000)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    temperature: float | None = Field(None, ge=0, le=2, description="above 0: sampled, without beams")
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool = False


WRITING_FIELDS = tuple(name for name in WritingBody.model_fields if name not in NativeBody.model_fields)


def choices_of(body: WritingBody, *, sampled_top_k: int | None = None, temperature: float | None = None) -> Choices:
    """`temperature` is for a request that names none."""
    return Choices(
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens,
        num_beams=body.num_beams,
        length_penalty=body.length_penalty,
        early_stopping=body.early_stopping,
        no_repeat_ngram_size=body.no_repeat_ngram_size,
        repetition_penalty=body.repetition_penalty,
        temperature=body.temperature if body.temperature is not None else temperature,
        top_k=sampled_top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=seed_of(body.seed),
    )


def writing_options(request: Request, body: NativeBody, task: str) -> RequestOptions:
    client, deadline = request_record(request).client, deadline_of(request, body.timeout)
    priority = priority_of(request, body.priority)
    return RequestOptions(task=task, client=client, priority=priority, deadline=deadline)


def refuse(body: NativeBody, names: Sequence[str], reason: str) -> None:
    """Raises UnsupportedParameter for the first of these fields that the request sets."""
    for name in names:
        if name in body.model_fields_set:
            raise UnsupportedParameter(f"{name} {reason}", param=name)


def one_alone(inputs: str | list[str]) -> str:
    """The text of a request that streams. Raises InvalidRequest for a list."""
    if not isinstance(inputs, str):
        raise InvalidRequest("a stream is of one text: send the texts of a list one by one", param="stream")
    return inputs


async def settled(work: Awaitable[T]) -> T | ServiceError:
    """One item's result, or its own fault."""
    try:
        return await work
    except ServiceError as error:
        return error


def raise_if_all_failed(outcomes: Sequence[object], *, param: str, single: bool) -> None:
    """A lone item's fault is the request's; in a list each stays with its item, unless nothing is left."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]
    if errors and len(errors) == len(outcomes):
        if not single and errors[0].param == param:
            errors[0].param = f"{param}.0"
        raise errors[0]


def fault_item(index: int, error: ServiceError) -> dict[str, Any]:
    return {"index": index, "error": error_item(error)}


def usage_of(spent: Spent) -> dict[str, int]:
    usage = {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "total_tokens": spent.prompt_tokens + spent.completion_tokens,
        "cached_tokens": spent.cached_tokens,
    }
    if spent.truncated_tokens:
        usage["truncated_tokens"] = spent.truncated_tokens
    if spent.map_calls:
        usage["map_calls"] = spent.map_calls
        usage["map_prompt_tokens"] = spent.map_prompt_tokens
        usage["map_completion_tokens"] = spent.map_completion_tokens
    return usage


def truncation(spent: Spent) -> dict[str, Any]:
    return {"truncated": True, "kept_tokens": spent.prompt_tokens} if spent.truncated_tokens else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A text under way: what stands in each of its chunks, and what was spent until it could be begun."""

    text: SerialText
    head: Mapping[str, Any]
    before: Spent = field(default_factory=Spent)


def stream_text(request: Request, model: LoadedModel, begin: Callable[[], Awaitable[Opening]]) -> Response:
    """The text as it is written: chunks of `delta`, the last with reason and usage, then `[DONE]`.

    To begin may take its time (the pieces of a long text are read first): the stream is open meanwhile.
    """
    record = request_record(request)
    record.model, record.version, record.stream = model.name, model.version, True
    return EventStream(_events(request, model, begin), quiet_seconds=quiet_seconds(request))


async def _events(
    request: Request, model: LoadedModel, begin: Callable[[], Awaitable[Opening]]
) -> AsyncGenerator[bytes, None]:
    opening = await begin()
    text = opening.text
    common = {**opening.head, "model": model.name, "model_version": model.version}

    def usage() -> dict[str, int]:
        found = usage_of(Spent.total([opening.before, text.spent]))
        note(request, model, found)
        return found

    deltas = aiter(text)
    try:
        yield _event(common, await first_of(deltas), usage)
        async for delta in deltas:
            yield _event(common, delta, usage)
        yield DONE
    finally:
        text.close()
        await deltas.aclose()


def _event(common: Mapping[str, Any], delta: Delta, usage: Callable[[], dict[str, int]]) -> bytes:
    chunk: dict[str, Any] = {**common, "delta": delta.text, "finish_reason": delta.finish_reason}
    if delta.finish_reason is not None:
        chunk["usage"] = usage()
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
