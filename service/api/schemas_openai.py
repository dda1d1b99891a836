"""OpenAI's requests as this service takes them: types, ranges, and which of their many extras are let pass.

A field that would change the answer and that is not supported is refused by name; one that is absent, null or at its
default is not. What depends on the checkpoint (ids, lengths, templates) is checked by the tasks. API process only.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.api.fail_fast import make_lists_fast
from service.logs import REQUEST_ID

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_ALLOWED = 4096
MAX_LOGPROBS = 20
INT32 = 2**31 - 1
INT64 = 2**63

Name = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=0, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
ChoiceText = Annotated[str, Field(min_length=1, max_length=4096)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
ConstraintText = Annotated[str, Field(min_length=1)]
ConstraintChoices = Annotated[list[ChoiceText], Field(min_length=1, max_length=1024)]
ConstraintSchema = dict[str, Any] | ConstraintText
"""A JSON schema, or the text of one."""
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID}$")]
AS_MANY_AS_FIT = -1
AsManyAsFit = Literal[-1]


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN; a null stands for an absent field, known or not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        make_lists_fast(handler.resolve_ref_schema(schema))
        return schema

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


class Lenient(Strict):
    """What a client sends back as it got it, from us or from another server: keys that nobody here knows are let be."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against guessing text from sizes: not done, and not needed for correctness."""
    continuous_usage_stats: bool = False
    """The numbers so far in every chunk, as vLLM has it."""


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's: what the object must fit")


class JsonSchema(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Strict):
    """vLLM's name for constraints on the text: exactly one of them."""

    json_: ConstraintSchema | None = Field(None, alias="json")
    regex: ConstraintText | None = None
    choice: ConstraintChoices | None = None
    grammar: ConstraintText | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar, json_object")
        return self


def text_alone(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """Around the type of a part of a message: what a part of another kind holds would be missed."""
    try:
        return check(value)
    except ValidationError:
        if not isinstance(value, str):
            raise
        raise ValueError(f"this service takes text; a part of type '{value[:64]}' cannot be read") from None


TextAlone = WrapValidator(text_alone)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ConstrainedBody(Strict):
    """What the text may be held to, by the names that OpenAI, vLLM, SGLang and llama.cpp have for it; one at a time."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: ConstraintSchema | None = None
    regex: ConstraintText | None = None
    grammar: ConstraintText | None = Field(None, description="Lark, or llama.cpp's GBNF")
    ebnf: ConstraintText | None = Field(None, description="SGLang's, which writes as GBNF does")
    guided_json: ConstraintSchema | None = None
    guided_regex: ConstraintText | None = None
    guided_choice: ConstraintChoices | None = None
    guided_grammar: ConstraintText | None = None


class GenerationBody(ConstrainedBody):
    """What completions and chat have in common."""

    model: Name | None = None
    """None: the first loaded checkpoint that can do it."""
    max_tokens: AsManyAsFit | Count | None = Field(None, description="-1: as many as fit")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default={}, max_length=1024)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="n: all choices are returned")
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="-1: a new one each time, as without one")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_CHOICES)
    include_stop_str_in_output: bool = False
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    bad_words: list[StopText] = Field(default=[], max_length=MAX_CHOICES)
    min_tokens: Count = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    use_beam_search: Literal[False] = False
    length_penalty: float = Field(1, ge=1, le=1, description="of beams, of which there are none")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(False, description="the prompt's and the answer's token ids beside the text")
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="vLLM's; of whole answers only")
    priority: int = Field(0, ge=-1000, le=1000, description="higher is sooner (vLLM: lower)")
    timeout: float | None = Field(None, gt=0, description="seconds; also by the header X-Request-Timeout")
    truncate_prompt_tokens: AsManyAsFit | Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="keep the prompt's last tokens; -1: as many as leave room for the answer"
    )
    request_id: RequestId | None = None
    rid: RequestId | None = None
    """vLLM's and SGLang's names for what the header X-Request-ID says; the header wins."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    user: str | None = None
    """Who the caller acts for: the same user gets the same version of a model that is shared out between several."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


def _kind_of_prompt(prompt: object) -> str | None:
    """Which of the prompt's types is meant, so that a fault is one of that type and not of all four."""
    if not isinstance(prompt, list):
        return "text" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else ""
    return "ids" if isinstance(first, int) else "lists of ids" if isinstance(first, list) else "texts"


Ids = Annotated[list[TokenId], Field(min_length=1)]
PromptText = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of ids")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="kind_of_prompt",
        custom_error_message="give a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


def as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request: a list of ids is one prompt, a list of texts or of such lists is several."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return cast("list[str | list[int]]", prompt)


class CompletionBody(GenerationBody):
    prompt: PromptText
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: str | None = None
    add_special_tokens: bool = True
