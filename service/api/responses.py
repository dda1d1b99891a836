"""`POST /v1/responses`: OpenAI's Responses over the same chat checkpoints, whole or as a stream of events.

A request becomes a conversation as `/v1/chat/completions` takes it, and its answer is told in items. Stateless: what
was said before comes with each request. HTTP only. Runs in the API process, on the event loop.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.chat import named_as, start_chat
from service.api.generating import engine_of, note_task, respond
from service.api.native import checked
from service.api.response_writer import ResponseWriter
from service.api.responses_answers import ResponseAnswer
from service.api.schemas_chat import MAX_MESSAGES, ChatBody
from service.api.schemas_responses import (
    FunctionCallItem,
    FunctionOutputItem,
    FunctionToolChoice,
    InputItem,
    InputText,
    JsonSchemaText,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
)
from service.errors import InvalidRequest, UnsupportedParameter

router = APIRouter(prefix="/v1", tags=["generation"])

PARAMS = {
    r"^messages\b.*": "input",
    r"^max_completion_tokens": "max_output_tokens",
    r"^response_format\b.*": "text.format",
    r"^reasoning_effort": "reasoning.effort",
}
"""What a field of chat completions, which a fault may name, is called here. Where in the input a message came from is
not known."""


@router.post("/responses", response_model=ResponseAnswer, summary="Answer a conversation, told in items")
async def create_response(request: Request, body: ResponsesBody) -> Response:
    for name, kept in (("previous_response_id", body.previous_response_id), ("conversation", body.conversation)):
        if kept is not None:
            raise UnsupportedParameter(
                f"{name}: nothing is kept here; send the whole conversation as input", param=name
            )
    model = engine_of(request).resolve(body.model, "chat")
    note_task(request, "chat", model, None)
    with named_as(PARAMS):
        chat = chat_body(body)
        generation, tools = await start_chat(request, chat, model)
    return await respond(request, generation, ResponseWriter(body, generation, tools), chat)


def chat_body(body: ResponsesBody) -> ChatBody:
    """The same request as chat completions take it; all that is in it has been checked."""
    messages = list(_messages(body))
    if len(messages) > MAX_MESSAGES:
        counts = f"{len(messages):,} messages; the limit is {MAX_MESSAGES:,}"
        raise InvalidRequest(f"input and instructions make {counts}", param="input")
    wants_logprobs = "message.output_text.logprobs" in body.include or bool(body.top_logprobs)
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": wants_logprobs,
        "top_logprobs": body.top_logprobs if wants_logprobs else None,
        "tools": [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ],
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body),
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "stream": body.stream,
        "seed": body.seed,
        "priority": body.priority,
        "timeout": body.timeout,
        "cache_salt": body.cache_salt,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return checked(ChatBody, fields)


def _tool_choice(body: ResponsesBody) -> Any:
    if isinstance(body.tool_choice, FunctionToolChoice):
        return {"type": "function", "function": {"name": body.tool_choice.name}}
    return body.tool_choice


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    format = body.text.format if body.text is not None else None
    if format is None:
        return None
    if isinstance(format, JsonSchemaText):
        schema = format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": "json_schema", "json_schema": schema}
    return format.model_dump(exclude_none=True, by_alias=True)


def _messages(body: ResponsesBody) -> Iterator[dict[str, Any]]:
    """Items as messages: what an assistant thought, said and called in a row is one message of its own."""
    if body.instructions is not None:
        yield {"role": "developer", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
        return
    turn: dict[str, Any] = {}
    for item in body.input:
        if turn and not _adds_to(turn, item):
            yield _said(turn)
            turn = {}
        match item:
            case MessageItem(role="assistant"):
                turn |= {"role": "assistant", "content": _text(item.content)}
            case MessageItem():
                yield {"role": item.role, "content": _text(item.content)}
            case FunctionCallItem():
                turn.setdefault("role", "assistant")
                function = {"name": item.name, "arguments": item.arguments}
                turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
            case FunctionOutputItem():
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            case ReasoningItem():
                thought = "\n".join(part.text for part in item.content or item.summary)
                turn |= {"role": "assistant", "reasoning_content": thought}
    if turn:
        yield _said(turn)


def _said(turn: dict[str, Any]) -> dict[str, Any]:
    """Who thought and was interrupted has said nothing."""
    return turn if "tool_calls" in turn else {"content": "", **turn}


def _adds_to(turn: dict[str, Any], item: InputItem) -> bool:
    """Whether an item belongs to the assistant's message under way."""
    match item:
        case MessageItem(role="assistant"):
            return "content" not in turn and "tool_calls" not in turn
        case FunctionCallItem():
            return True
        case _:
            return False


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
