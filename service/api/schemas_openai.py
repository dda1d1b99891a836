"""OpenAI's requests as this service takes them: types, ranges, and which of their many extras are let pass.

A field that would change the answer and that is not supported is refused by name; one that is absent, null or at its
default is not. What depends on the checkpoint (ids, lengths, templates) is checked by the tasks. API process only.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_LOGPROBS = 20
INT32 = 2**31 - 1
INT64 = 2**63

Name = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=0, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN; a null stands for an absent field, known or not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The description, too, lets a null stand for an absent field of a request."""
        schema = handler(core_schema)
        if handler.mode == "validation":
            fields = handler.resolve_ref_schema(schema)
            required = fields.get("required", ())
            for name, field in fields.get("properties", {}).items():
                if name not in required and {"type": "null"} not in field.get("anyOf", ()):
                    fields["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return schema


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against guessing text from sizes: not done, and not needed for correctness."""


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class GenerationBody(Strict):
    """What completions and chat have in common."""

    model: Name | None = None
    """None: the first loaded checkpoint that can do it."""
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default={}, max_length=1024)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_CHOICES)
    min_tokens: Count = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="Lark, or llama.cpp's GBNF")
    priority: int = Field(0, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="seconds; also by the header X-Request-Timeout")
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=INT32, description="keep the prompt's last tokens")
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    user: str | None = None
    """Who the caller acts for: of no effect here."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _kind_of_prompt(prompt: object) -> str:
    """Which of the prompt's types is meant, so that a fault is one of that type and not of all four."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "ids" if isinstance(first, int) else "lists of ids" if isinstance(first, list) else "texts"


Ids = Annotated[list[TokenId], Field(min_length=1)]
PromptText = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of ids")],
    Discriminator(_kind_of_prompt),
]


class CompletionBody(GenerationBody):
    prompt: PromptText
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None
    add_special_tokens: bool = True


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class MessageToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Left over by clients that put a stream together."""


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: list[Any] | None = None
    """In assistant messages that a client sends back as it got them; of no effect."""


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
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    store: Literal[False] = False
    metadata: dict[str, str] | None = None
    """Belongs to stored completions, of which there are none here."""
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """OpenAI's routing hint: here all requests share one cache."""


class TokenizeBody(Strict):
    model: Name | None = None
    text: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    add_special_tokens: bool | None = None
    """Default: true for a text; a chat template writes its own."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_tokens: bool = True
    return_offsets: bool = True


class DetokenizeBody(Strict):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2_000_000)]
    skip_special_tokens: bool = False
