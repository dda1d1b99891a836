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
from service.api.schemas_openai import GenerationBody, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from service.api.state import request_record, request_state
from service.engine.models import LoadedModel
from service.errors import DeadlineExceeded, InvalidGrammar, InvalidRequest, ServiceError
from service.tasks import grammars
from service.tasks.generation import Delta, Generation, GenerationEngine, RequestOptions
from service.tasks.sampling import SamplingOptions

TIMEOUT_HEADER = "X-Request-Timeout"


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


async def grammar_of(request: Request, body: GenerationBody, deadline: float | None) -> Grammar | None:
    """The one constraint that the body sets on the text, checked."""
    found: list[tuple[str, Grammar]] = []
    match body.response_format:
        case JsonObjectFormat():
            found.append(("response_format", Grammar("json_object")))
        case JsonSchemaFormat(json_schema=wanted):
            found.append(("response_format.json_schema.schema", grammars.json_schema(wanted.schema_)))
    if body.regex is not None:
        found.append(("regex", Grammar("regex", body.regex)))
    if body.grammar is not None:
        found.append(("grammar", Grammar("lark", body.grammar)))
    if body.structured_outputs is not None:
        found.append(_structured(body.structured_outputs))
    if len(found) > 1:
        names = [param.split(".")[0] for param, _ in found]
        raise InvalidRequest(f"{' and '.join(names)} exclude each other", param=names[-1])
    if not found:
        return None
    param, grammar = found[0]
    return await checked_grammar(request, grammar, param=param, deadline=deadline)


def _structured(wanted: StructuredOutputs) -> tuple[str, Grammar]:
    match wanted:
        case StructuredOutputs(json_=str() as text):
            found = "json", Grammar("json_schema", text)
        case StructuredOutputs(json_=dict() as schema):
            found = "json", grammars.json_schema(schema)
        case StructuredOutputs(regex=str() as regex):
            found = "regex", Grammar("regex", regex)
        case StructuredOutputs(choice=list() as texts):
            found = "choice", grammars.one_of(texts)
        case StructuredOutputs(grammar=str() as text):
            found = "grammar", Grammar("lark", text)
        case _:
            found = "json_object", Grammar("json_object")
    return f"structured_outputs.{found[0]}", found[1]


async def checked_grammar(request: Request, grammar: Grammar, *, param: str, deadline: float | None) -> Grammar:
    """Within the time that grammars have, and within the request's own. Raises InvalidGrammar, DeadlineExceeded."""
    limit = request_state(request).settings.grammar_timeout
    left = math.inf if deadline is None else deadline - time.monotonic()
    try:
        return await grammars.checked(grammar, param=param, timeout_seconds=min(limit, left))
    except InvalidGrammar:
        if left < limit and deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded("the request's deadline passed while its grammar was checked") from None
        raise


def sampling_options(
    body: GenerationBody,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None,
) -> SamplingOptions:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes with stream: true", param="stream_options")
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
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


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
