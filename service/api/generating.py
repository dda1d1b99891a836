"""What the generating endpoints share: from a body to the task's terms, and from deltas to an answer or a stream.

HTTP and OpenAI's conventions; what is generated is the tasks' business. Runs in the API process, on the event loop.
"""

import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol, cast

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from model.batch import Grammar
from service.api.answers_openai import PromptTokensDetails, UsageAnswer
from service.api.event_stream import EventStream, until_gone
from service.api.schemas_openai import AS_MANY_AS_FIT, GenerationBody
from service.api.state import request_record, request_state
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError, UnsupportedParameter
from service.logs import request_id_context
from service.tasks.generation import Delta, Generation, GenerationEngine, RequestOptions
from service.tasks.prompts import room_for_prompt
from service.tasks.sampling import SamplingOptions

TIMEOUT_HEADER = "X-Request-Timeout"
REQUEST_ID_HEADER = "X-Request-ID"


class AnswerWriter(Protocol):
    """Makes one endpoint's answer of a generation's deltas: chunk by chunk, or whole."""

    def chunk(self, delta: Delta) -> bytes: ...

    def end(self, usage: UsageAnswer) -> bytes: ...

    def add(self, delta: Delta) -> None: ...

    def answer(self, usage: UsageAnswer) -> BaseModel: ...


def engine_of(request: Request) -> GenerationEngine:
    return cast(GenerationEngine, request_state(request).engine)


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def request_options(request: Request, body: GenerationBody, task: str) -> RequestOptions:
    return RequestOptions(
        task=task,
        client=request_record(request).client,
        priority=priority_of(request, body.priority),
        deadline=deadline_of(request, body.timeout),
        cache_salt=body.cache_salt,
    )


def deadline_of(request: Request, timeout: float | None) -> float:
    """The soonest of the body's timeout, the header's, and the service's own."""
    limits = [request_state(request).settings.max_request_timeout]
    if timeout is not None:
        limits.append(timeout)
    header = request.headers.get(TIMEOUT_HEADER)
    if header is not None:
        try:
            seconds = float(header)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise InvalidRequest(f"{TIMEOUT_HEADER} is a number of seconds above 0", param=TIMEOUT_HEADER)
        limits.append(seconds)
    return time.monotonic() + min(limits)


def priority_of(request: Request, asked: int) -> int:
    """Where strangers share the service, nobody outranks the others unless the operator lets them."""
    state = request_state(request)
    limit = state.settings.max_priority
    if limit is None and state.authenticator.needs_key:
        limit = 0
    if limit is not None and asked > limit:
        raise InvalidRequest(f"priority is {asked}; the limit is {limit} (--max-priority)", param="priority")
    return asked


def name_request(request: Request, body: GenerationBody) -> None:
    """By the body's id, where the header X-Request-ID gives none (or none that can be used)."""
    record, asked = request_record(request), body.request_id or body.rid
    if asked is not None and request.headers.get(REQUEST_ID_HEADER) != record.request_id:
        record.request_id = asked
        request_id_context.set(asked)


def sampling_options(
    body: GenerationBody,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None,
) -> SamplingOptions:
    """`prompt_logprobs` are those of an echo; the body may ask for its own."""
    _check_options(body)
    of_prompt = [count for count in (prompt_logprobs, body.prompt_logprobs) if count is not None]
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=body.seed,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=body.stops,
        stop_token_ids=tuple(body.stop_token_ids),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=tuple(body.bad_words),
        logprobs=logprobs,
        prompt_logprobs=max(of_prompt, default=None),
        grammar=grammar,
    )


def _check_options(body: GenerationBody) -> None:
    """What every endpoint's options must have in common to fit each other."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes with stream: true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        message = "prompt_logprobs come with a whole answer: leave out stream"
        raise UnsupportedParameter(message, param="prompt_logprobs")
    if body.best_of not in (None, body.n):
        raise UnsupportedParameter("best_of: all n choices are returned; ask for n of them", param="best_of")


def kept_prompt_tokens(body: GenerationBody, model: LoadedModel, max_tokens: int | None) -> int | None:
    """How many of a prompt's last tokens are kept, before an answer of `max_tokens`; None: all, or it is an error."""
    asked = body.truncate_prompt_tokens
    return room_for_prompt(model, max_tokens) if asked == AS_MANY_AS_FIT else asked


async def respond(request: Request, generation: Generation, writer: AnswerWriter, body: GenerationBody) -> Response:
    """Runs the generation to its end, closes it whatever happens, and answers."""
    _note_start(request, generation, stream=body.stream)
    deltas = _noted(request, generation)
    if body.stream:
        events = _events(deltas, generation, writer, body)
        return EventStream(events, quiet_seconds=quiet_seconds(request), on_close=generation.close)
    try:
        await until_gone(request, _collect(deltas, writer))
    finally:
        await _close(deltas, generation)
    answer = writer.answer(usage_answer(generation, body))
    return Response(answer.model_dump_json(), media_type="application/json")


def quiet_seconds(request: Request) -> float:
    """After which a stream that has nothing to say gives a sign of life; 0: it gives none."""
    return request_state(request).settings.stream_keep_alive


def usage_answer(generation: Generation, body: GenerationBody) -> UsageAnswer:
    usage = generation.usage
    cut = sum(prompt.num_truncated for prompt in generation.prompts)
    return UsageAnswer(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        truncated_prompt_tokens=cut if body.truncate_prompt_tokens is not None else None,
    )


async def _events(
    deltas: AsyncGenerator[Delta, None],
    generation: Generation,
    writer: AnswerWriter,
    body: GenerationBody,
) -> AsyncGenerator[bytes, None]:
    try:
        yield writer.chunk(await first_of(deltas))
        async for delta in deltas:
            event = writer.chunk(delta)
            if event:
                yield event
        yield writer.end(usage_answer(generation, body))
    finally:
        await _close(deltas, generation)


async def first_of(deltas: AsyncIterator[Delta]) -> Delta:
    async for delta in deltas:
        return delta
    raise ServiceError("the engine ended the request without an answer")


async def _collect(deltas: AsyncIterator[Delta], writer: AnswerWriter) -> None:
    async for delta in deltas:
        writer.add(delta)


async def _close(deltas: AsyncGenerator[Delta, None], generation: Generation) -> None:
    generation.close()
    await deltas.aclose()


def _note_start(request: Request, generation: Generation, *, stream: bool) -> None:
    record, model = request_record(request), generation.model
    record.model, record.version, record.stream = model.name, model.version, stream
    record.prompt_tokens = generation.usage.prompt_tokens


async def _noted(request: Request, generation: Generation) -> AsyncGenerator[Delta, None]:
    """Passes deltas on; at the end, however it comes, the access line gets its numbers."""
    reasons: dict[str, None] = {}
    try:
        async for delta in generation:
            if delta.finish_reason is not None:
                reasons[delta.finish_reason] = None
            yield delta
    finally:
        record, usage = request_record(request), generation.usage
        record.cached_tokens, record.output_tokens = usage.cached_tokens, usage.completion_tokens
        record.finish_reason = ",".join(reasons)
        timings = [choice.stream.timings for choice in generation.choices]
        started = [entry.started - entry.accepted for entry in timings if entry.started is not None]
        answered = [entry.first_output - entry.accepted for entry in timings if entry.first_output is not None]
        record.queue_seconds = min(started, default=None)
        record.first_token_seconds = min(answered, default=None)


def note_task(request: Request, task: str, model: LoadedModel, prompt: str | None) -> None:
    record = request_record(request)
    record.task, record.model, record.version, record.prompt = task, model.name, model.version, prompt
