"""Anthropic's Messages as this service takes them: blocks, tools, thinking; nothing is kept between requests.

A field that would change the answer and that is not supported is refused by name. What marks blocks for Anthropic's
cache is let pass: here all requests share one. API process only.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from service.api.schemas_chat import MAX_MESSAGES, MAX_TOOLS, ToolName
from service.api.schemas_openai import INT32, INT64, MAX_STOPS, Name, StopText, Strict


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Marked(Strict):
    cache_control: CacheControl | None = None


class TextBlock(Marked):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None
    """In messages that a client sends back as it got them; of no effect."""


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""
    """Not checked: thoughts are taken from whoever had them."""


class RedactedThinkingBlock(Strict):
    """Another service's thoughts, encrypted: nobody here can read them."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Marked):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    """Left over by clients; of no effect."""


def _kind_of_block(block: object) -> str:
    """Not the type alone: `text` and `thinking` are also names of fields, and a fault must name the right one."""
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"{kind} block"


def _one_of(*kinds: str) -> Discriminator:
    text = f"the type of a block is one of {', '.join(kinds)} in a message of this role"
    return Discriminator(_kind_of_block, custom_error_type="block_type", custom_error_message=text)


def _refuse_media(block: object) -> object:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in ("image", "document"):
        raise ValueError(f"{kind}s are not supported: models here read text alone")
    return block


ReadText = Annotated[TextBlock, BeforeValidator(_refuse_media)]
TextContent = str | Annotated[list[ReadText], Field(min_length=1)]


class ToolResultBlock(Marked):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)]
    content: str | list[ReadText] = ""
    is_error: bool = False


UserBlock = Annotated[
    Annotated[TextBlock, Tag("text block")] | Annotated[ToolResultBlock, Tag("tool_result block")],
    _one_of("text", "tool_result"),
    BeforeValidator(_refuse_media),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking block")]
    | Annotated[ToolUseBlock, Tag("tool_use block")],
    _one_of("text", "thinking", "redacted_thinking", "tool_use"),
    BeforeValidator(_refuse_media),
]


class UserMessage(Strict):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1)]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(min_length=1)]


class SystemMessage(Strict):
    role: Literal["system"]
    content: TextContent


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class CustomTool(Marked):
    """The caller's own tool; those that Anthropic runs have other types, and there is nobody here to run them."""

    type: Literal["custom"] = "custom"
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    """Whether a call's input may come before it is whole: it always does."""


class FreeToolChoice(Strict):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool = False


class NamedToolChoice(Strict):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool = False


class NoToolChoice(Strict):
    type: Literal["none"]


ToolChoice = Annotated[FreeToolChoice | NamedToolChoice | NoToolChoice, Field(discriminator="type")]


class ThinkingEnabled(Strict):
    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1, le=INT32)]
    """How much to think, in the words that a template has for it; `max_tokens` alone is a limit."""
    display: Literal["summarized"] | None = None


class ThinkingAdaptive(Strict):
    type: Literal["adaptive"]
    display: Literal["summarized"] | None = None


class ThinkingDisabled(Strict):
    type: Literal["disabled"]


Thinking = Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")]


class JsonOutput(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class Metadata(Strict):
    user_id: Annotated[str, Field(max_length=256)] | None = None


class CountTokensBody(Strict):
    """What makes the prompt."""

    model: Name | None = None
    """None: the first loaded checkpoint that can do it."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[ReadText] = ""
    tools: list[CustomTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    cache_control: CacheControl | None = None
    chat_template_kwargs: dict[str, Any] = Field({})


class MessagesBody(CountTokensBody):
    max_tokens: Annotated[int, Field(ge=1, le=INT32)]
    stop_sequences: list[StopText] = Field([], max_length=MAX_STOPS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32, description="0 or -1: off")
    stream: bool = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    priority: int = Field(0, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="seconds; also by the header X-Request-Timeout")
    cache_salt: Annotated[str, Field(max_length=256)] = ""
