"""OpenAI's answers: the shapes of whole ones, and of the chunks that streams are made of.

Whole answers are pydantic models, so that the OpenAPI description is what is sent; chunks are msgspec structs, of which
thousands are encoded in a second. API process only.
"""

from typing import Literal

import msgspec
from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    truncated_prompt_tokens: int | None = Field(None, exclude_if=_is_none)
    """Tokens that `truncate_prompt_tokens` cut off the prompts; there only where it was asked for."""


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """The checkpoint's version."""
    choices: list[CompletionChoice]
    usage: UsageAnswer


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerFunction(BaseModel):
    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = Field(None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionChunk(msgspec.Struct):
    index: int
    text: str
    logprobs: dict[str, object] | None = None
    finish_reason: str | None = None


class CallFunctionChunk(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class CallChunk(msgspec.Struct, omit_defaults=True):
    index: int
    id: str | None = None
    type: str | None = None
    function: CallFunctionChunk | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[CallChunk] | None = None


class ChatChunk(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: dict[str, object] | None = None
    finish_reason: str | None = None


class ChunkEncoder:
    """Encodes the chunks of one stream; all but the choice is made once.

    A chunk is `data: {"id": ..., "choices": [CHOICE]}` and an empty line; with `include_usage` each has `usage: null`,
    and a last one without choices has the numbers.
    """

    def __init__(self, head: dict[str, object], *, include_usage: bool) -> None:
        self._encoder = msgspec.json.Encoder()
        self._before = b"data: " + self._encoder.encode(head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def choice(self, choice: CompletionChunk | ChatChunk) -> bytes:
        return self._before + self._encoder.encode(choice) + self._after

    def usage(self, usage: UsageAnswer) -> bytes:
        return self._before + b'],"usage":' + usage.model_dump_json().encode() + b"}\n\n"


DONE = b"data: [DONE]\n\n"
