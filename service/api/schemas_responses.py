"""OpenAI's Responses as this service takes them: input items, tools, text formats; nothing is kept between requests.

A field that would change the answer and that is not supported is refused by name; items are what clients send back as
they got them, and keys in them that nobody here knows are let be. API process only.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidatorFunctionWrapHandler, WrapValidator

from service.api.schemas_chat import MAX_MESSAGES, MAX_TOOLS, ReasoningEffort, ToolName
from service.api.schemas_openai import (
    INT32,
    INT64,
    MAX_LOGPROBS,
    JsonObjectFormat,
    Lenient,
    Name,
    Strict,
    TextAlone,
    TextFormat,
)

Role = Literal["system", "developer", "user", "assistant"]
SummaryKind = Literal["auto", "concise", "detailed"]


class InputText(Lenient):
    type: Annotated[Literal["input_text", "output_text", "text"], TextAlone]
    text: str


class MessageItem(Lenient):
    type: Literal["message"] = "message"
    role: Role
    content: str | Annotated[list[InputText], Field(min_length=1)]


class FunctionCallItem(Lenient):
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class FunctionOutputItem(Lenient):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], Field(min_length=1)]


class ReasoningText(Lenient):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Lenient):
    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field([])
    content: list[ReasoningText] = Field([])
    encrypted_content: None = None
    """Another server's, which cannot be read here and would be missed."""


def _kind_of_item(item: object) -> str:
    return str(item.get("type") or "message") if isinstance(item, dict) else "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind_of_item),
]


class FunctionTool(Strict):
    """Flat, where chat completions nest it."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolChoice(Strict):
    type: Literal["function"]
    name: ToolName


class JsonSchemaText(Strict):
    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: ReasoningEffort | None = None
    summary: SummaryKind | None = None
    generate_summary: SummaryKind | None = None
    """Where a summary of what was thought is wanted it comes whole, as the reasoning item's text, as it does anyway."""


class ResponseStreamOptions(Strict):
    include_obfuscation: bool = False


def _no_truncation(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """OpenAI's `auto` drops items from the middle of a conversation without saying which."""
    if value == "auto":
        raise ValueError("items are never left out unasked: what is too long is refused with the numbers, send fewer")
    return check(value)


class ResponsesBody(Strict):
    model: Name | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field([])
    """Encrypted reasoning is what stateless clients ask for: here reasoning comes in the open, and goes back so."""
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="-1: a new one each time, as without one")
    priority: int = Field(0, ge=-1000, le=1000, description="higher is sooner (vLLM: lower)")
    timeout: float | None = Field(None, gt=0, description="seconds; also by the header X-Request-Timeout")
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    chat_template_kwargs: dict[str, Any] = Field({})
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    """Both name what was kept elsewhere, and are refused."""
    store: bool = Field(False, description="nothing is kept, and the answer says so: send the conversation each time")
    background: Literal[False] = False
    truncation: Annotated[Literal["disabled"], WrapValidator(_no_truncation)] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
