"""`POST /v1/completions`: text that goes on from a prompt, in OpenAI's shape, whole or as a stream.

HTTP only: prompts, sampling and streams of tokens are the tasks'. Runs in the API process, on the event loop.
"""

import time
from typing import cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.batch import TokenLogprobs
from service.api.answers_openai import (
    DONE,
    ChunkEncoder,
    CompletionAnswer,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    UsageAnswer,
)
from service.api.generating import (
    engine_of,
    grammar_of,
    new_id,
    note_task,
    request_options,
    respond,
    sampling_options,
)
from service.api.schemas_openai import CompletionBody
from service.api.token_logprobs import completion_logprobs
from service.engine.models import LoadedModel
from service.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from service.tasks.generation import Delta, Generation, Prompt, start_generation
from service.tasks.prompts import checked_ids, encode_text, truncated
from service.tasks.sampling import SamplingOptions, sampling_params

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/completions", response_model=CompletionAnswer, summary="Continue a prompt")
async def create_completion(request: Request, body: CompletionBody) -> Response:
    _check(body)
    engine = engine_of(request)
    model = engine.resolve(body.model, "generate")
    if body.echo and model.description.sequence_to_sequence is not None:
        raise UnsupportedParameter(f"echo: {model.name} reads the prompt and does not continue it", param="echo")
    note_task(request, "generate", model, body.prompt if isinstance(body.prompt, str) else None)
    options = request_options(request, body, "generate")
    prompt_logprobs = body.logprobs if body.echo else None
    sampling = sampling_options(
        body,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=await grammar_of(request, body, options.deadline),
    )
    prompts = await _prompts(body, model, sampling)
    generation = start_generation(engine, model, prompts, options, n=body.n)
    return await respond(request, generation, CompletionWriter(body, generation), body)


def _check(body: CompletionBody) -> None:
    if body.suffix is not None:
        raise UnsupportedParameter("suffix: text cannot be inserted, only continued", param="suffix")
    if body.best_of is not None and body.best_of != body.n:
        raise UnsupportedParameter("best_of: all n choices are returned; ask for n of them", param="best_of")
    num_sequences = len(_as_list(body)) * body.n
    if num_sequences > MAX_SEQUENCES:
        message = f"{num_sequences:,} choices are asked for (prompts times n); the limit is {MAX_SEQUENCES:,}"
        raise InvalidRequest(message, param="n")


def _as_list(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of the request: a list of ids is one prompt, a list of texts or of such lists is several."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return cast("list[str | list[int]]", prompt)


async def _prompts(body: CompletionBody, model: LoadedModel, options: SamplingOptions) -> list[Prompt]:
    prompts = []
    for position, entry in enumerate(given := _as_list(body)):
        param = f"prompt.{position}" if len(given) > 1 else "prompt"
        if isinstance(entry, str):
            limit = None if body.truncate_prompt_tokens is None else len(entry) + 1
            ids = await encode_text(
                model, entry, param=param, add_special_tokens=body.add_special_tokens, max_tokens=limit
            )
        else:
            ids = checked_ids(model, entry, param=param)
        ids, num_truncated = truncated(ids, body.truncate_prompt_tokens)
        if not ids:
            raise InvalidRequest(f"{param} is empty: {model.name} needs at least one token", param=param)
        source, begins_with = _parted(model, ids, param)
        sampling = sampling_params(
            options, model, len(begins_with), default_max_tokens=DEFAULT_MAX_TOKENS, prompt_param=param
        )
        prompts.append(
            Prompt(
                ids=begins_with,
                encoder_ids=source,
                sampling=sampling,
                stop=options.stop,
                skip_special_tokens=body.skip_special_tokens,
                continues=not source and _has_text(model, ids, skip_special_tokens=body.skip_special_tokens),
                num_truncated=num_truncated,
            )
        )
    return prompts


def _parted(model: LoadedModel, ids: list[int], param: str) -> tuple[list[int], list[int]]:
    """What the encoder reads and what the completion goes on from: an encoder-decoder's prompt is all source."""
    defaults = model.description.sequence_to_sequence
    if defaults is None:
        return [], ids
    context = model.description.context_length
    if len(ids) > context:
        raise ContextLengthExceeded(f"{param} has {len(ids):,} tokens; {model.name} reads {context:,}", param=param)
    return ids, defaults.decoder_prompt


def _has_text(model: LoadedModel, ids: list[int], *, skip_special_tokens: bool) -> bool:
    """Whether the prompt shows any text: if not, the completion begins one, and drops what a beginning drops."""
    return not skip_special_tokens or any(not model.tokenizer.is_special(id) for id in ids)


class CompletionWriter:
    """Choice i continues prompt i // n; with `echo` it begins with that prompt."""

    def __init__(self, body: CompletionBody, generation: Generation) -> None:
        model = generation.model
        self._body = body
        self._generation = generation
        self._tokenizer = model.tokenizer
        self._head: dict[str, object] = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.version,
        }
        self._encoder = ChunkEncoder(self._head, include_usage=body.include_usage)
        self._begun = [False] * len(generation.choices)
        self._whole = [CompletionChoice(index=n, text="", finish_reason="") for n in range(len(generation.choices))]
        self._echo_chars = [0] * len(generation.choices)

    def chunk(self, delta: Delta) -> bytes:
        text, logprobs = self._read(delta)
        built = None if logprobs is None else logprobs.model_dump()
        return self._encoder.choice(CompletionChunk(delta.index, text, built, delta.finish_reason))

    def end(self, usage: UsageAnswer) -> bytes:
        return (self._encoder.usage(usage) if self._body.include_usage else b"") + DONE

    def add(self, delta: Delta) -> None:
        text, logprobs = self._read(delta)
        choice = self._whole[delta.index]
        choice.text += text
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        if logprobs is None:
            return
        if choice.logprobs is None:
            choice.logprobs = logprobs
            return
        choice.logprobs.tokens += logprobs.tokens
        choice.logprobs.token_logprobs += logprobs.token_logprobs
        choice.logprobs.top_logprobs += logprobs.top_logprobs
        choice.logprobs.text_offset += logprobs.text_offset

    def answer(self, usage: UsageAnswer) -> CompletionAnswer:
        return CompletionAnswer.model_validate({**self._head, "choices": self._whole, "usage": usage})

    def _read(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        """The delta's text and log-probabilities, the prompt's before the first ones where it is echoed."""
        text, tokens, offsets = delta.text, list[TokenLogprobs | int](delta.tokens), list(delta.offsets)
        if self._body.echo:
            shift = self._echo_chars[delta.index]
            if not self._begun[delta.index]:
                prompt_text, prompt_tokens, prompt_offsets = self._echo(delta)
                shift = self._echo_chars[delta.index] = len(prompt_text)
                text, tokens = prompt_text + text, prompt_tokens + tokens
                offsets = prompt_offsets + [offset + shift for offset in offsets]
            else:
                offsets = [offset + shift for offset in offsets]
        self._begun[delta.index] = True
        if self._body.logprobs is None:
            return text, None
        return text, completion_logprobs(self._tokenizer, tokens, offsets)

    def _echo(self, delta: Delta) -> tuple[str, list[TokenLogprobs | int], list[int]]:
        """The prompt as it was given (decoded, where it was ids), and its tokens; nothing predicts the first."""
        number = delta.index // self._body.n
        ids, given = self._generation.prompts[number].ids, _as_list(self._body)[number]
        detokenizer = self._tokenizer.detokenizer()
        text, offsets = "", []
        for id in ids:
            offsets.append(len(text))
            text += detokenizer.push((id,))
        text += detokenizer.flush()
        if isinstance(given, str) and not self._generation.prompts[number].num_truncated:
            text = given
        tokens: list[TokenLogprobs | int] = [ids[0], *delta.prompt_logprobs]
        return text, tokens if self._body.logprobs is not None else [], offsets
