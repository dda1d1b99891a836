"""`POST /v1/chat/completions`: a conversation's next message, in OpenAI's shape, with tools, whole or as a stream.

HTTP only: templates, tool formats and streams of tokens are the tasks'. Runs in the API process, on the event loop.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.batch import Grammar
from service.api.answers_openai import ChatAnswer
from service.api.chat_writer import ChatWriter
from service.api.constraints import checked_grammar, grammar_of
from service.api.generating import (
    engine_of,
    kept_prompt_tokens,
    name_request,
    note_task,
    request_options,
    respond,
    sampling_options,
)
from service.api.schemas_chat import ChatBody, NamedToolChoice
from service.api.schemas_openai import AS_MANY_AS_FIT
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError
from service.tasks.chat import Conversation, ToolUse, chat_prompt, thoughts_of, tool_use
from service.tasks.generation import Generation, Prompt, start_generation
from service.tasks.prompts import truncated
from service.tasks.reasoning import after_thoughts, marker_ids
from service.tasks.sampling import sampling_params, with_token_rules

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/chat/completions", response_model=ChatAnswer, summary="Answer a conversation")
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    name_request(request, body)
    model = engine_of(request).resolve(body.model, "chat")
    note_task(request, "chat", model, None)
    generation, tools = await start_chat(request, body, model)
    return await respond(request, generation, ChatWriter(body, generation, tools), body)


async def start_chat(request: Request, body: ChatBody, model: LoadedModel) -> tuple[Generation, ToolUse | None]:
    """The reply under way, for whoever tells it, and how it may call tools."""
    options = request_options(request, body, "chat")
    tools = tool_use_of(body, model)
    prompt = await _prompt(request, body, model, tools, options.deadline)
    return start_generation(engine_of(request), model, [prompt], options, n=body.n), tools


@contextmanager
def named_as(params: Mapping[str, str]) -> Iterator[None]:
    """For callers who wrote another body: faults name its fields. `params` turns, by expressions, ours into theirs."""
    try:
        yield
    except ServiceError as error:
        if error.param is not None:
            ours = theirs = error.param
            for expression, name in params.items():
                theirs = re.sub(expression, name, theirs)
            error.param, error.message = theirs, error.message.replace(ours, theirs, 1)
        raise


def conversation_of(body: ChatBody) -> Conversation:
    return Conversation(
        messages=[message.model_dump(exclude_none=True) for message in body.messages],
        tools=[] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools],
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_variables=body.chat_template_kwargs,
        reasoning_effort=body.reasoning_effort,
    )


def tool_use_of(body: ChatBody, model: LoadedModel) -> ToolUse | None:
    asked = body.tool_choice or "auto"
    choice, name = ("named", asked.function.name) if isinstance(asked, NamedToolChoice) else (asked, None)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return tool_use(model, tools, choice=choice, name=name, parallel=body.parallel_tool_calls)


async def _prompt(
    request: Request, body: ChatBody, model: LoadedModel, tools: ToolUse | None, deadline: float | None
) -> Prompt:
    """Checks what must fit together, then makes the ids and the sampling parameters."""
    _check(body)
    grammar = await _grammar(request, body, tools, deadline)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    max_tokens = None if asked == AS_MANY_AS_FIT else asked
    conversation = conversation_of(body)
    kept = kept_prompt_tokens(body, model, max_tokens)
    ids, num_truncated = truncated(await chat_prompt(model, conversation), kept)
    if not ids:
        raise InvalidRequest("the chat template makes an empty prompt of this conversation", param="messages")
    thoughts = thoughts_of(model, conversation, ids)
    grammar = after_thoughts(model, grammar, thoughts)
    options = sampling_options(
        body, max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None, grammar=grammar
    )
    sampling = sampling_params(
        await with_token_rules(options, model),
        model,
        len(ids),
        default_max_tokens=None,
        prompt_param="messages",
        max_tokens_param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
    )
    return Prompt(
        ids=ids,
        sampling=sampling,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        includes_stop=body.include_stop_str_in_output,
        keeps_ids=body.return_token_ids,
        skip_special_tokens=body.skip_special_tokens,
        keep_special=marker_ids(model) | (frozenset() if tools is None else tools.keep_special),
        continues=body.continue_final_message,
        thoughts=thoughts,
        num_truncated=num_truncated,
    )


def _check(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs: true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        message = "max_tokens and max_completion_tokens differ: give one of them"
        raise InvalidRequest(message, param="max_completion_tokens")
    if not (body.include_reasoning or body.separate_reasoning):
        message = "include_reasoning: false hides what is told apart; separate_reasoning: false leaves it in the text"
        raise InvalidRequest(message, param="include_reasoning")


async def _grammar(request: Request, body: ChatBody, tools: ToolUse | None, deadline: float | None) -> Grammar | None:
    """What the reply must be, after its thoughts, by its format and its tools."""
    wanted = await grammar_of(request, body, deadline)
    if tools is None:
        return wanted
    grammar = tools.grammar(wanted)
    return None if grammar is None else await checked_grammar(request, grammar, param="tools", deadline=deadline)
