"""Conversations and tools in OpenAI's shape, and what asks for tokens: types, ranges, harmless extras.

As in `schemas_openai`, what would change the answer and is not supported is refused by name. Messages are another
matter: clients send back what they were given, with whatever other servers have put into it. API process only.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from service.api.schemas_openai import (
    INT32,
    MAX_LOGPROBS,
    AsManyAsFit,
    GenerationBody,
    Lenient,
    Name,
    Strict,
    TextAlone,
    TokenId,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 128

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


MaxTokens = AsManyAsFit | Annotated[int, Field(ge=1, le=INT32)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class TextPart(Lenient):
    type: Annotated[Literal["text"], TextAlone]
    text: str


class CalledFunction(Lenient):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class MessageToolCall(Lenient):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Lenient):
    """`audio`, `images` and `function_call` are what would be missed if it were let be: they must be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    audio: None = None
    images: None = None
    function_call: None = None


class FunctionDefinition(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Strict):
    name: ToolName


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: MaxTokens | None = Field(None, description="-1: as many as fit")
    max_completion_tokens: MaxTokens | None = Field(None, description="-1: as many as fit")
    echo: Literal[False] = False
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = Field({})
    store: bool = Field(False, description="nothing is kept, and the answer says so")
    metadata: dict[str, str] | None = None
    """Belongs to stored completions, of which there are none here."""
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    """OpenAI's hints: here all requests share one cache."""
    reasoning_effort: ReasoningEffort | None = None
    """For templates that read it, or that let thinking be turned off ("none")."""
    separate_reasoning: bool = Field(True, description="what a model thinks goes to reasoning_content")
    include_reasoning: bool = Field(True, description="false: what a model thinks is not told")
    verbosity: Literal["medium"] | None = None


class TokenizeBody(Strict):
    """`prompt` is vLLM's name of `text`, and `return_token_strs` its way to ask for the pieces once more."""

    model: Name | None = None
    text: str | None = Field(None, validation_alias=AliasChoices("text", "prompt"), description="or `prompt`")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    """Default: true for a text; a chat template writes its own."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    return_tokens: bool = True
    return_offsets: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2_000_000)]
    skip_special_tokens: bool = False
