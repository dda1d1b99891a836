"""`POST /v1/completions`: text that goes on from a prompt, in OpenAI's shape, whole or as a stream.

HTTP only: prompts, sampling and streams of tokens are the tasks'. Runs in the API process, on the event loop.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.answers_openai import CompletionAnswer
from service.api.completion_writer import CompletionWriter
from service.api.constraints import grammar_of
from service.api.generating import (
    engine_of,
    kept_prompt_tokens,
    name_request,
    note_task,
    request_options,
    respond,
    sampling_options,
)
from service.api.schemas_openai import AS_MANY_AS_FIT, CompletionBody, as_list
from service.engine.models import LoadedModel
from service.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from service.tasks.generation import Generation, Prompt, start_generation
from service.tasks.prompts import checked_ids, encode_text, truncated
from service.tasks.sampling import SamplingOptions, context_limit, sampling_params, with_token_rules

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/completions", response_model=CompletionAnswer, summary="Continue a prompt")
async def create_completion(request: Request, body: CompletionBody) -> Response:
    generation = await start_completion(request, body)
    return await respond(request, generation, CompletionWriter(body, generation), body)


async def start_completion(request: Request, body: CompletionBody) -> Generation:
    """The text under way, for whoever tells it."""
    name_request(request, body)
    _check(body)
    engine = engine_of(request)
    model = engine.resolve(body.model, "generate")
    _check_reads_on(body, model)
    note_task(request, "generate", model, body.prompt if isinstance(body.prompt, str) else None)
    options = request_options(request, body, "generate")
    prompt_logprobs = body.logprobs if body.echo else None
    sampling = sampling_options(
        body,
        max_tokens=None if body.max_tokens == AS_MANY_AS_FIT else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=await grammar_of(request, body, options.deadline),
    )
    prompts = await _prompts(body, model, sampling)
    return start_generation(engine, model, prompts, options, n=body.n)


def _check(body: CompletionBody) -> None:
    if body.suffix is not None:
        raise UnsupportedParameter("suffix: text cannot be inserted, only continued", param="suffix")
    num_sequences = len(as_list(body.prompt)) * body.n
    if num_sequences > MAX_SEQUENCES:
        message = f"{num_sequences:,} choices are asked for (prompts times n); the limit is {MAX_SEQUENCES:,}"
        raise InvalidRequest(message, param="n")


def _check_reads_on(body: CompletionBody, model: LoadedModel) -> None:
    """Nothing is told of a prompt that is only read."""
    if model.description.sequence_to_sequence is None:
        return
    for name, asked in (("echo", body.echo), ("prompt_logprobs", body.prompt_logprobs is not None)):
        if asked:
            raise UnsupportedParameter(f"{name}: {model.name} reads the prompt and does not continue it", param=name)


async def _prompts(body: CompletionBody, model: LoadedModel, options: SamplingOptions) -> list[Prompt]:
    options = await with_token_rules(options, model)
    prompts = []
    default_max_tokens = None if body.max_tokens == AS_MANY_AS_FIT else DEFAULT_MAX_TOKENS
    kept = kept_prompt_tokens(body, model, default_max_tokens if options.max_tokens is None else options.max_tokens)
    for position, entry in enumerate(given := as_list(body.prompt)):
        param = f"prompt.{position}" if len(given) > 1 else "prompt"
        if isinstance(entry, str):
            limit = None if kept is None else len(entry) + 1
            ids = await encode_text(
                model, entry, param=param, add_special_tokens=body.add_special_tokens, max_tokens=limit
            )
        else:
            ids = checked_ids(model, entry, param=param)
        ids, num_truncated = truncated(ids, kept)
        if not ids:
            raise InvalidRequest(f"{param} is empty: {model.name} needs at least one token", param=param)
        source, begins_with = _parted(model, ids, param)
        sampling = sampling_params(
            options, model, len(begins_with), default_max_tokens=default_max_tokens, prompt_param=param
        )
        prompts.append(
            Prompt(
                ids=begins_with,
                encoder_ids=source,
                sampling=sampling,
                stop=options.stop,
                stop_token_ids=options.stop_token_ids,
                includes_stop=body.include_stop_str_in_output,
                keeps_ids=body.return_token_ids,
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
    context = context_limit(model)
    if len(ids) > context:
        message = f"The prompt is too long: {param} has {len(ids):,} tokens; {model.name} reads {context:,}"
        raise ContextLengthExceeded.of_context(context, message, param=param)
    return ids, defaults.decoder_prompt


def _has_text(model: LoadedModel, ids: list[int], *, skip_special_tokens: bool) -> bool:
    """Whether the prompt shows any text: if not, the completion begins one, and drops what a beginning drops."""
    return not skip_special_tokens or any(not model.tokenizer.is_special(id) for id in ids)
