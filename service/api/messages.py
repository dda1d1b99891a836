"""`POST /v1/messages`: Anthropic's Messages over the same chat checkpoints, whole or as a stream of events.

A request becomes a conversation as `/v1/chat/completions` takes it, and its answer is told in blocks. Stateless: what
was said before comes with each request. HTTP only. Runs in the API process, on the event loop.
"""

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.chat import conversation_of, named_as, start_chat, tool_use_of
from service.api.generating import engine_of, note_task, respond
from service.api.message_writer import MessageWriter
from service.api.messages_answers import MessageAnswer, MessageFaultAnswer, TokenCount
from service.api.native import checked
from service.api.schemas_chat import MAX_MESSAGES, ChatBody
from service.api.schemas_messages import (
    AssistantMessage,
    CountTokensBody,
    CustomTool,
    FreeToolChoice,
    MessagesBody,
    NamedToolChoice,
    NoToolChoice,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolResultBlock,
    ToolUseBlock,
)
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, UnsupportedParameter
from service.http.body import stick_to_user
from service.tasks.chat import chat_prompt
from service.tasks.reasoning import reads_effort, thinks

FAULT: dict[int | str, dict[str, Any]] = {
    "default": {"model": MessageFaultAnswer, "description": "Refused or failed, in Anthropic's envelope"}
}
router = APIRouter(prefix="/v1", tags=["generation"], responses=FAULT)

SAME = ("model", "temperature", "top_p", "top_k", "stream", "seed", "priority", "timeout", "cache_salt")
"""Fields that chat completions call the same."""

PARAMS = {
    r"^max_completion_tokens": "max_tokens",
    r"^response_format\.json_schema": "output_config.format",
    r"^reasoning_effort": "output_config.effort",
    r"^(tools\.\d+)\.function": r"\1",
}
"""What other fields of chat completions, which a fault may name, are called here."""

CHOICES = {"auto": "auto", "any": "required"}
LOW_BUDGET_TOKENS, MEDIUM_BUDGET_TOKENS = 2048, 8192
"""Budgets up to which thinking takes little, or some, effort."""

Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


@router.post("/messages", response_model=MessageAnswer, summary="Answer a conversation, as Anthropic's clients ask")
async def create_message(request: Request, body: MessagesBody) -> Response:
    if body.metadata is not None and body.metadata.user_id:
        stick_to_user(request.scope, body.metadata.user_id)
    model = engine_of(request).resolve(body.model, "chat")
    note_task(request, "chat", model, None)
    with named_as(PARAMS):
        chat = chat_body(body, model)
        generation, tools = await start_chat(request, chat, model)
    return await respond(request, generation, MessageWriter(chat, generation, tools), chat)


@router.post("/messages/count_tokens", response_model=TokenCount, summary="How long a conversation's prompt is")
async def count_tokens(request: Request, body: CountTokensBody) -> Response:
    model = engine_of(request).resolve(body.model, "chat")
    note_task(request, "tokenize", model, None)
    with named_as(PARAMS):
        chat = chat_body(body, model)
        tool_use_of(chat, model)
        ids = await chat_prompt(model, conversation_of(chat))
    return Response(TokenCount(input_tokens=len(ids)).model_dump_json(), media_type="application/json")


def chat_body(body: CountTokensBody, model: LoadedModel) -> ChatBody:
    """The same request as chat completions take it; all that is in it has been checked."""
    format = body.output_config.format
    fields: dict[str, Any] = {name: getattr(body, name, None) for name in SAME} | {
        "messages": _messages(body),
        "continue_final_message": _continues(body),
        "tools": [_tool(tool) for tool in body.tools],
        "reasoning_effort": _effort(body, model),
        "chat_template_kwargs": body.chat_template_kwargs,
        **_tool_choice(body),
    }
    if format is not None:
        schema = {"name": "output", "schema": format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesBody):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
    return checked(ChatBody, fields)


def _tool(tool: CustomTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "strict": tool.strict}
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _tool_choice(body: CountTokensBody) -> dict[str, Any]:
    match body.tool_choice:
        case None:
            return {}
        case NoToolChoice():
            return {"tool_choice": "none"}
        case NamedToolChoice() as choice:
            chosen: Any = {"type": "function", "function": {"name": choice.name}}
        case FreeToolChoice() as choice:
            chosen = CHOICES[choice.type]
    return {"tool_choice": chosen, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _effort(body: CountTokensBody, model: LoadedModel) -> str | None:
    """How much to think. None leaves it to the checkpoint, as `adaptive` does."""
    asked = body.output_config.effort
    effort = "xhigh" if asked == "max" else asked
    match body.thinking:
        case ThinkingEnabled(budget_tokens=budget):
            _check_budget(body, budget)
            if reads_effort(model):
                return effort or _effort_of(budget)
            if not thinks(model):
                raise UnsupportedParameter(f"{model.name} does not think before it answers", param="thinking")
        case ThinkingDisabled() if thinks(model) or reads_effort(model):
            if effort is not None:
                raise InvalidRequest("thinking is disabled: an effort goes with thoughts", param="output_config.effort")
            if not reads_effort(model):
                raise UnsupportedParameter(f"{model.name} always thinks before it answers", param="thinking")
            return "none"
    return effort


def _check_budget(body: CountTokensBody, budget_tokens: int) -> None:
    if isinstance(body, MessagesBody) and budget_tokens >= body.max_tokens:
        counts = f"{budget_tokens:,} of max_tokens {body.max_tokens:,}"
        message = f"budget_tokens is {counts}: nothing is left to answer in"
        raise InvalidRequest(message, param="thinking.budget_tokens")


def _effort_of(budget_tokens: int) -> str:
    if budget_tokens <= LOW_BUDGET_TOKENS:
        return "low"
    return "medium" if budget_tokens <= MEDIUM_BUDGET_TOKENS else "high"


# -- conversations ----------------------------------------------------------------------------------------------------


def _messages(body: CountTokensBody) -> list[dict[str, Any]]:
    """A turn is one message, however many it came in; each result of a tool is a message of its own."""
    turns: list[dict[str, Any]] = []
    for block in _blocks(body.system or []):
        _add(turns, "system", block)
    for message in body.messages:
        for block in _blocks(message.content):
            _add(turns, message.role, block)
    if len(turns) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(turns):,} turns; the limit is {MAX_MESSAGES:,}", param="messages")
    return [turn if "tool_calls" in turn else {"content": "", **turn} for turn in turns]


def _blocks(content: Any) -> list[Block]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _add(turns: list[dict[str, Any]], role: str, block: Block) -> None:
    if isinstance(block, ToolResultBlock):
        turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        return
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role})
    turn = turns[-1]
    match block:
        case TextBlock():
            turn.setdefault("content", []).append({"type": "text", "text": block.text})
        case ThinkingBlock():
            before = [turn["reasoning_content"]] if "reasoning_content" in turn else []
            turn["reasoning_content"] = "\n".join([*before, block.thinking])
        case ToolUseBlock():
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            turn.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})


def _result(block: ToolResultBlock) -> str:
    """No template has a place for a failure: the text says it."""
    text = "\n".join(part.text for part in _blocks(block.content) if isinstance(part, TextBlock))
    return f"Error: {text}" if block.is_error else text


def _continues(body: CountTokensBody) -> bool:
    """Whether the reply goes on from the last message, as it does where that is the assistant's own."""
    last = body.messages[-1]
    if not isinstance(last, AssistantMessage):
        return False
    if any(isinstance(block, ToolUseBlock) for block in _blocks(last.content)):
        param = f"messages.{len(body.messages) - 1}"
        raise InvalidRequest(f"{param}: what a tool_use gave must follow as a tool_result", param=param)
    return True
