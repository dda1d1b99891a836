"""What our own endpoints share: the body's common fields, the answer's envelope, the error of one item in a batch.

HTTP only. Runs in the API process.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, cast

import msgspec
from fastapi import Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api.generating import deadline_of, priority_of
from service.api.schemas_openai import Name, Strict, TokenId
from service.api.state import request_record, request_state
from service.engine.models import LoadedModel
from service.errors import ServiceError
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions

MAX_ITEMS = 2048
MAX_LABELS = 512

InputText = Annotated[str, Field(max_length=2_000_000)]
FilledText = Annotated[str, Field(min_length=1, max_length=2_000_000)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _kind_of_input(value: object) -> str:
    """Which of the input's types is meant, so that a fault is one of that type and not of all four."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    return "id lists" if isinstance(first, list) else "ids" if isinstance(first, int) else "texts"


TextsOrIds = Annotated[
    Annotated[FilledText, Tag("text")]
    | Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ITEMS), Tag("id lists")],
    Discriminator(_kind_of_input),
]
"""What OpenAI's embeddings take. Token ids are read so that they can be refused with a reason."""


class NativeBody(Strict):
    """Unknown fields are refused by name."""

    model: Name | None = None
    """None: the first loaded checkpoint that can do it."""
    priority: int = Field(0, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="seconds; also by the header X-Request-Timeout")
    truncate: bool = Field(False, description="cut what is too long, and say so, instead of refusing it")
    user: str | None = None
    """Who the caller acts for: the same user gets the same version of a model that is shared out between several."""


def model_of_address(request: Request) -> str | None:
    """Which checkpoint an address asks for whose body has no place for a name: `/embed?model=minilm`."""
    return request.query_params.get("model")


def encode_engine(request: Request) -> EncodeEngine:
    return cast(EncodeEngine, request_state(request).engine)


def encode_options(request: Request, body: NativeBody, task: str) -> EncodeOptions:
    return EncodeOptions(
        task=task,
        truncate=body.truncate,
        client=request_record(request).client,
        priority=priority_of(request, body.priority),
        deadline=deadline_of(request, body.timeout),
    )


def error_item(error: ServiceError) -> dict[str, Any]:
    """One item's fault inside an answer whose other items are well."""
    return {"message": error.message, "type": error.type, "code": error.code}


class ReadText(Protocol):
    """A text that a network has read, or as much of it as it was given."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_truncated(self) -> int: ...


def usage_of(texts: Sequence[ReadText]) -> dict[str, int]:
    num_tokens = sum(text.num_tokens for text in texts)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    truncated = sum(text.num_truncated for text in texts)
    if truncated:
        usage["truncated_tokens"] = truncated
    return usage


def truncation(texts: Sequence[EncodedText]) -> dict[str, Any]:
    """What an item says of itself whose texts were cut: the tokens that the network read."""
    if not any(text.num_truncated for text in texts):
        return {}
    return {"truncated": True, "kept_tokens": sum(text.num_tokens for text in texts)}


def envelope(request: Request, model: LoadedModel, data: list[Any], usage: dict[str, int], **more: Any) -> Response:
    """The one shape of our own answers; notes tokens and model for the access line."""
    note(request, model, usage)
    body = {
        "object": "list", "model": model.name, "model_version": model.version, **more, "data": data, "usage": usage,
    }  # fmt: skip
    return json_response(body)


def json_response(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


def tell_truncation(response: Response, usage: Mapping[str, int]) -> Response:
    """In a header, where the shape of the answer has no place for it."""
    if usage.get("truncated_tokens"):
        response.headers["x-truncated-tokens"] = str(usage["truncated_tokens"])
    return response


def note(request: Request, model: LoadedModel, usage: dict[str, int]) -> None:
    record = request_record(request)
    record.model, record.version = model.name, model.version
    record.prompt_tokens = usage["prompt_tokens"]
    record.output_tokens = usage.get("completion_tokens", 0)
