"""Anthropic's Messages as they are answered: blocks of content, the message around them, errors. API process only."""

from typing import Any, Literal

from pydantic import BaseModel

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Text(BaseModel):
    type: Literal["text"] = "text"
    text: str = ""


class Thinking(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""


class ToolUse(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = {}


Block = Text | Thinking | ToolUse


class MessageUsage(BaseModel):
    """What was in the cache is no part of `input_tokens`; what is put there costs nothing, and counts as input."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block] = []
    stop_reason: StopReason | None = None
    """None in the beginning of a stream alone."""
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(BaseModel):
    input_tokens: int


class MessageFault(BaseModel):
    type: str
    message: str


class MessageFaultAnswer(BaseModel):
    type: Literal["error"]
    error: MessageFault
    request_id: str
