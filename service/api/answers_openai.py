"""OpenAI's answers: the shapes of whole ones, and of the chunks that streams are made of.

Whole answers are pydantic models, so that the OpenAPI description is what is sent; chunks are msgspec structs, of which
thousands are encoded in a second. API process only.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec
from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(default=None, exclude_if=_is_none)
    """There only where thoughts are told apart from the answer."""
    truncated_prompt_tokens: int | None = Field(default=None, exclude_if=_is_none)
    """Tokens that `truncate_prompt_tokens` cut off the prompts; there only where it was asked for."""


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """vLLM's; `rank` is null where a token is not among those that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, for each of a prompt's tokens; null for the first, which nothing predicts."""
StopReason = int | str | None
"""vLLM's: the caller's stop string or stop id that ended a text, null if neither did."""


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str
    stop_reason: StopReason = None
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    """Both there only with `return_token_ids`."""


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
    reasoning_content: str | None = Field(default=None, exclude_if=_is_none)
    reasoning: str | None = Field(default=None, exclude_if=_is_none)
    """What the model thought before it answered, by both of its names."""
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = Field(default=None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: StopReason = None
    token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    """Like the choices' `token_ids` there only with `return_token_ids`."""
    store: Literal[False] | None = Field(default=None, exclude_if=_is_none)
    """There only where `store` was asked for: nothing is kept."""
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=_is_none)


Ids = list[int] | msgspec.UnsetType
LastStopReason = int | str | None | msgspec.UnsetType
"""In a choice's last chunk alone."""


class CompletionChunk(msgspec.Struct):
    index: int
    text: str
    logprobs: dict[str, object] | None = None
    finish_reason: str | None = None
    stop_reason: LastStopReason = msgspec.UNSET
    prompt_token_ids: Ids = msgspec.UNSET
    token_ids: Ids = msgspec.UNSET


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
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallChunk] | None = None


class ChatChunk(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: dict[str, object] | None = None
    finish_reason: str | None = None
    stop_reason: LastStopReason = msgspec.UNSET
    token_ids: Ids = msgspec.UNSET


class ChunkEncoder:
    """Encodes the chunks of one stream; what all have in common is made once.

    A chunk is `data: {"id": ..., "choices": [CHOICE]}` and an empty line; with `include_usage` each has `usage: null`,
    and a last one without choices has the numbers.
    """

    def __init__(self, head: dict[str, object], *, include_usage: bool) -> None:
        self._encoder = msgspec.json.Encoder()
        self._before = b"data: " + self._encoder.encode(head)[:-1] + b',"choices":['
        self._common: dict[str, object] = {"usage": None} if include_usage else {}
        self._after = self._end(self._common)

    def choice(self, choice: CompletionChunk | ChatChunk, more: Mapping[str, object] | None = None) -> bytes:
        """`more` are fields beside the choice."""
        after = self._end({**self._common, **more}) if more else self._after
        return self._before + self._encoder.encode(choice) + after

    def usage(self, usage: UsageAnswer) -> bytes:
        return self._before + self._end({"usage": usage.model_dump()})

    def _end(self, fields: dict[str, object]) -> bytes:
        return (b"]," + self._encoder.encode(fields)[1:] if fields else b"]}") + b"\n\n"


DONE = b"data: [DONE]\n\n"
