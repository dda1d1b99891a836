"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, with their headers.

Knows how faults of the framework and of pydantic read as advice; what is a fault is decided elsewhere, and so is which
paths have another envelope.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from pydantic import ValidationError
from starlette.types import Send

from service.errors import InvalidRequest, ServiceError, UnsupportedParameter

DEFAULT_RETRY_AFTER_SECONDS = 1.0
MAX_FAULTS = 256
"""Of a body, that are looked at for the most telling."""
Headers = list[tuple[bytes, bytes]]


class BodyTimeout(ServiceError):
    status = 408
    type = "timeout_error"
    code = "request_timeout"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class UrlTooLong(InvalidRequest):
    status = 414
    code = "url_too_long"


class HeadersTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"


def error_body(error: ServiceError) -> dict[str, Any]:
    """The envelope as data; a stream sends it in an event of its own."""
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


envelope_context: ContextVar[Callable[[ServiceError], dict[str, Any]]] = ContextVar("envelope", default=error_body)
"""Set for the length of a request whose clients expect other errors than OpenAI's."""


def error_headers(error: ServiceError) -> Headers:
    headers: Headers = []
    if error.status in (429, 503):
        seconds = error.retry_after if error.retry_after is not None else DEFAULT_RETRY_AFTER_SECONDS
        headers.append((b"retry-after", str(max(math.ceil(seconds), 1)).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def encode_error(error: ServiceError) -> bytes:
    """Escapes what is not ASCII: a message may quote a caller's half surrogates."""
    return json.dumps(envelope_context.get()(error)).encode("ascii")


async def send_error(send: Send, error: ServiceError, *, headers: Headers | None = None, close: bool = False) -> None:
    """Answers with the error. `close` ends the connection, for a client whose body was not read to its end."""
    body = encode_error(error)
    all_headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *error_headers(error),
        *(headers or []),
    ]
    if close:
        all_headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


def fault_of_body(error: ValidationError, body: object) -> ServiceError:
    """What pydantic has against a request's body."""
    faults = error.errors(include_url=False, include_input=False)
    return validation_error([{**fault, "loc": ("body", *fault["loc"])} for fault in faults[:MAX_FAULTS]], body)


def validation_error(faults: Sequence[Mapping[str, Any]], body: object) -> ServiceError:
    """The most telling of pydantic's faults, as advice: the deepest one beneath the first field at fault.

    Where a field may be of several types, pydantic reports a fault for each; those at the same place are joined.
    """
    located = [(_path(fault, body), fault) for fault in faults]
    first = located[0][0][:1]
    path = max((path for path, _ in located if path[:1] == first), key=len)
    messages = list(dict.fromkeys(_message(fault) for other, fault in located if other == path))
    param = ".".join(str(part) for part in path) or None
    text = ", or ".join(messages[:4])
    error = UnsupportedParameter if located[0][1]["type"] == "extra_forbidden" and len(path) else InvalidRequest
    return error(f"{param}: {text}" if param else f"the body: {text}", param=param)


def _path(fault: Mapping[str, Any], body: object) -> tuple[str | int, ...]:
    """Where in the body, without the names of union members that pydantic puts between the field names."""
    place, *rest = fault["loc"]
    if place != "body":
        return tuple(rest)
    found: list[str | int] = []
    value: Any = body
    if fault["type"].startswith("union_tag_") and (name := _discriminator(fault)) is not None:
        rest.append(name)
    for index, part in enumerate(rest):
        if _holds(value, part):
            value = value[part]
        elif not (fault["type"] in ("missing", "union_tag_not_found") and index == len(rest) - 1):
            continue
        found.append(part)
    return tuple(found)


def _discriminator(fault: Mapping[str, Any]) -> str | None:
    """The field that tells the members of a union apart, where that is a field; pydantic puts it in quotes."""
    name = str(fault["ctx"]["discriminator"])
    return name.strip("'") if name.startswith("'") else None


def _holds(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _message(fault: Mapping[str, Any]) -> str:
    match fault["type"]:
        case "missing" | "union_tag_not_found":
            return "this field is required"
        case "union_tag_invalid":
            return f"'{fault['ctx']['tag'][:64]}' is none of those there are: {fault['ctx']['expected_tags']}"
        case "extra_forbidden":
            return "there is no such field"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "input should be an object"
        case _:
            message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
            message = message.replace(" after validation", "")
            return message[:1].lower() + message[1:]
