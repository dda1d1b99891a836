"""What our own endpoints share: the body's common fields, the answer's envelope, the error of one item in a batch.

HTTP only. Runs in the API process.
"""

import asyncio
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar, cast

import msgspec
import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.generating import deadline_of, priority_of
from service.api.schemas_openai import INT32, Name, Strict, TokenId
from service.api.state import request_record, request_state
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, PayloadTooLarge, ServiceError
from service.http.envelope import fault_of_body
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions
from service.tasks.sparse_embeddings import embed_sparse

MAX_ITEMS = 2048
MAX_LABELS = 512
MAX_NUMBERS = MAX_ITEMS * 4096
"""Numbers of an answer's vectors: as the longest list of texts has them at a width of 4,096. Written down they are
about 180 MB."""
INLINE_NUMBERS = 20_000
"""More of them are written in a thread: some milliseconds of work."""

InputText = Annotated[str, Field(max_length=2_000_000)]
FilledText = Annotated[str, Field(min_length=1, max_length=2_000_000)]
PromptName = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Body = TypeVar("Body", bound=BaseModel)


def _kind_of_input(value: object) -> str | None:
    """Which of the input's types is meant, so that a fault is one of that type and not of all four."""
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    first = value[0] if value else ""
    return "id lists" if isinstance(first, list) else "ids" if isinstance(first, int) else "texts"


TextsOrIds = Annotated[
    Annotated[FilledText, Tag("text")]
    | Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ITEMS), Tag("id lists")],
    Discriminator(
        _kind_of_input, custom_error_type="kind_of_input", custom_error_message="give a text, or a list of texts"
    ),
]
"""What OpenAI's embeddings take. Token ids are read so that they can be refused with a reason."""


IN_ADDRESS = ("model", "head", "truncate")
"""What endpoints in the shapes of other servers read of their address."""


class NativeBody(Strict):
    """Unknown fields are refused by name."""

    model: Name | None = None
    """None: the first loaded checkpoint that can do it."""
    priority: int = Field(0, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, description="seconds; also by the header X-Request-Timeout")
    truncate: bool = Field(False, description="cut what is too long, and say so, instead of refusing it")
    user: str | None = None
    """Who the caller acts for: the same user gets the same version of a model that is shared out between several."""


class EncodeBody(NativeBody):
    """Of endpoints that only read: texts may be cut by vLLM's names, too."""

    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=INT32)] | Literal[-1] | None = Field(
        None, description="cut texts to so many tokens; -1: to the checkpoint's limit"
    )
    truncation_side: Literal["left", "right"] = Field("right", description="at which end texts are cut")


def of_address(request: Request, name: str) -> str | None:
    """What an address asks for whose body has no place for it: `/embed?model=minilm`. Raises: InvalidRequest for what
    no address can ask for."""
    unknown = next((given for given in request.query_params if given not in IN_ADDRESS), None)
    if unknown is not None:
        message = f"the address asks for '{unknown[:64]}'; what it may ask for here is {', '.join(IN_ADDRESS)}"
        raise InvalidRequest(message, param=unknown[:64])
    return request.query_params.get(name)


def model_of_address(request: Request) -> str | None:
    return of_address(request, "model")


def truncates_by_address(request: Request) -> bool:
    """Whether an address asks for cutting, for clients that can put no field into the body: `/embed?truncate=true`."""
    asked = (of_address(request, "truncate") or "false").lower()
    if asked not in ("true", "false"):
        raise InvalidRequest(f"truncate in the address is true or false, not '{asked[:64]}'", param="truncate")
    return asked == "true"


def checked(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    """Another endpoint's body. Raises: InvalidRequest as that endpoint would."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise fault_of_body(error, dict(fields)) from error


def encode_engine(request: Request) -> EncodeEngine:
    return cast(EncodeEngine, request_state(request).engine)


def encode_options(request: Request, body: NativeBody, task: str) -> EncodeOptions:
    limit, at_start = None, False
    if isinstance(body, EncodeBody):
        limit, at_start = body.truncate_prompt_tokens, body.truncation_side == "left"
    return EncodeOptions(
        task=task,
        truncate=(body.truncate or limit is not None) and ("start" if at_start else True),
        max_tokens=None if limit == -1 else limit,
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


def written_one_by_one(items: Iterable[Any]) -> list[msgspec.Raw]:
    """As JSON: what a checkpoint of many labels says of many texts, in Python's objects, would take far more memory."""
    return [msgspec.Raw(msgspec.json.encode(item)) for item in items]


def json_response(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


def check_numbers(num_vectors: int, size: int | None, *, param: str) -> None:
    """Raises: PayloadTooLarge, with the numbers, if an answer of so many vectors would be too large."""
    if size is not None and num_vectors * size > MAX_NUMBERS:
        raise PayloadTooLarge(
            f"the answer would have {num_vectors:,} vectors of {size:,} numbers, {num_vectors * size:,} in all; "
            f"the limit is {MAX_NUMBERS:,}. Send fewer or shorter texts at once",
            param=param,
        )


async def sparse_vectors(
    request: Request, model: LoadedModel, texts: Sequence[str], options: EncodeOptions, *, prompt: str, param: str
) -> list[EncodedText]:
    """Raises: PayloadTooLarge, naming `param`, as soon as the vectors that have come would make too large an answer."""
    max_entries = MAX_NUMBERS // 2
    work = embed_sparse(encode_engine(request), model, texts, options, prompt=prompt, max_entries=max_entries)
    try:
        return await until_gone(request, work)
    except PayloadTooLarge as error:
        error.param = param
        raise


async def written_sparse(
    texts: Sequence[EncodedText], write: Callable[[Sequence[EncodedText]], list[msgspec.Raw]]
) -> list[msgspec.Raw]:
    """Sparse vectors as JSON, in a thread where there is much to write."""
    num_numbers = sum(text.values.size for text in texts if text.values is not None)
    return await asyncio.to_thread(write, texts) if num_numbers > INLINE_NUMBERS else write(texts)


async def vectors_response(rows: Sequence[NDArray[np.float32]]) -> Response:
    """A text's vector each, or a text's tokens' vectors."""
    is_large = sum(row.size for row in rows) > INLINE_NUMBERS
    content = await asyncio.to_thread(_written, rows) if is_large else _written(rows)
    return Response(content, media_type="application/json")


def _written(rows: Sequence[NDArray[np.float32]]) -> bytes:
    """As JSON, a vector after the other: all of their numbers as Python's would take several times the memory."""
    out = io.BytesIO()
    _write(out, rows)
    return out.getvalue()


def _write(out: io.BytesIO, rows: Sequence[NDArray[np.float32]] | NDArray[np.float32]) -> None:
    out.write(b"[")
    for place, row in enumerate(rows):
        if place:
            out.write(b",")
        if row.ndim > 1:
            _write(out, row)
        else:
            out.write(msgspec.json.encode(row.tolist()))
    out.write(b"]")


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
