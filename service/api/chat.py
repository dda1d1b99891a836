"""`POST /v1/chat/completions`: a conversation's next message, in OpenAI's shape, with tools, whole or as a stream.

HTTP only: templates, tool formats and streams of tokens are the tasks'. Runs in the API process, on the event loop.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.batch import Grammar
from service.api.answers_openai import (
    ChatAnswer,
)
from service.api.chat_writer import ChatWriter
from service.api.generating import (
    checked_grammar,
    engine_of,
    grammar_of,
    note_task,
    request_options,
    respond,
    sampling_options,
)
from service.api.schemas_chat import ChatBody, NamedToolChoice
from service.engine.models import LoadedModel
from service.errors import InvalidRequest
from service.tasks.chat import Conversation, ToolUse, chat_prompt, tool_use
from service.tasks.generation import Prompt, start_generation
from service.tasks.prompts import truncated
from service.tasks.reasoning import marker_ids
from service.tasks.sampling import sampling_params, with_token_rules

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/chat/completions", response_model=ChatAnswer, summary="Answer a conversation")
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    engine = engine_of(request)
    model = engine.resolve(body.model, "chat")
    note_task(request, "chat", model, None)
    options = request_options(request, body, "chat")
    tools = tool_use_of(body, model)
    prompt = await make_prompt(request, body, model, tools, options.deadline)
    generation = start_generation(engine, model, [prompt], options, n=body.n)
    return await respond(request, generation, ChatWriter(body, generation, tools), body)


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


async def make_prompt(
    request: Request, body: ChatBody, model: LoadedModel, tools: ToolUse | None, deadline: float | None
) -> Prompt:
    """Checks what must fit together, then makes the ids and the sampling parameters."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs: true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        message = "max_tokens and max_completion_tokens differ: give one of them"
        raise InvalidRequest(message, param="max_completion_tokens")
    grammar, may_think = await _grammar(request, body, tools, deadline)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    options = sampling_options(
        body, max_tokens=asked, logprobs=(body.top_logprobs or 0) if body.logprobs else None, grammar=grammar
    )
    ids, num_truncated = truncated(await chat_prompt(model, conversation_of(body)), body.truncate_prompt_tokens)
    if not ids:
        raise InvalidRequest("the chat template makes an empty prompt of these messages", param="messages")
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
        includes_stop=body.include_stop_str_in_output,
        keeps_ids=body.return_token_ids,
        skip_special_tokens=body.skip_special_tokens,
        keep_special=marker_ids(model) | (frozenset() if tools is None else tools.keep_special),
        continues=body.continue_final_message,
        may_think=may_think,
        num_truncated=num_truncated,
    )


async def _grammar(
    request: Request, body: ChatBody, tools: ToolUse | None, deadline: float | None
) -> tuple[Grammar | None, bool]:
    """What the reply must be, by its format and its tools; and whether that leaves room for thoughts before it."""
    wanted = await grammar_of(request, body, deadline)
    if tools is None:
        return wanted, wanted is None
    grammar = tools.grammar(wanted)
    if grammar is not None:
        grammar = await checked_grammar(request, grammar, param="tools", deadline=deadline)
    return grammar, wanted is None and not tools.is_required
