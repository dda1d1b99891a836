"""Reads a request's body whole, within its limits, and lets only sound JSON through to the handlers.

Size (declared, chunked or inflated from gzip), time, memory over all requests, media type, encoding and JSON itself are
checked here, once, so that no handler has to. Pure ASGI. Runs in the API process, on the event loop.
"""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.state import BODY_KEY, WHOLE_KEY, scope_record
from service.engine.aliases import sticky_key_context
from service.errors import ClientGone, InvalidRequest, PayloadTooLarge, ServiceError, Unavailable
from service.http.envelope import BodyTimeout, UnsupportedMediaType, UrlTooLong, send_error
from service.http.inflating import Inflater, InvalidEncoding, inflater_of
from service.http.strict_json import check_json

MAX_URL_BYTES = 8192
HELD_BODIES = 64
"""So many bodies of the largest size may be in memory at once; beyond that a request is asked to come again."""

INLINE_BYTES = 1 << 16
"""Longer bodies are read in a thread: 8 MiB of nothing but empty objects take four seconds, 64 KiB 30 milliseconds."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    max_bytes: int
    max_json_depth: int
    timeout_seconds: float


class BodyReader:
    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        reads = _has_body(scope)
        try:
            try:
                _check_url(scope)
                if reads:
                    await self._read(scope, receive, body)
            except ClientGone:
                scope_record(scope).error = ClientGone.code or ""
                return
            except ServiceError as error:
                scope_record(scope).error = error.code or ""
                unread = error.status in (408, 413, 414, 415, 503) or isinstance(error, InvalidEncoding)
                await send_error(send, error, close=unread)
                return
            await self._app(scope, _replay(bytes(body), receive) if reads else receive, send)
        finally:
            self._held_bytes -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Fills `body`, whose bytes count as held as soon as they are in it."""
        headers = dict(scope["headers"])
        inflater = inflater_of(headers)
        declared = _declared_length(headers)
        if declared is not None and declared > self._limits.max_bytes:
            raise self._too_large(f"{declared:,}")
        if WHOLE_KEY in scope["state"]:
            await self._receive_all(receive, body, inflater)
        else:
            await self._receive_in_time(receive, body, inflater)
        if body:
            _check_media_type(headers)
            said = scope["state"][BODY_KEY] = await self._check(bytes(body))
            _note_user(scope, said)

    async def _check(self, body: bytes) -> object:
        if len(body) <= INLINE_BYTES:
            return check_json(body, self._limits.max_json_depth)
        return await asyncio.to_thread(check_json, body, self._limits.max_json_depth)

    async def _receive_in_time(self, receive: Receive, body: bytearray, inflater: Inflater | None) -> None:
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                await self._receive_all(receive, body, inflater)
        except TimeoutError as error:
            message = f"the body did not arrive within {self._limits.timeout_seconds:g} seconds"
            raise BodyTimeout(message) from error

    async def _receive_all(self, receive: Receive, body: bytearray, inflater: Inflater | None) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("the client left while sending its body")
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            if inflater is not None:
                chunk = inflater.feed(chunk, self._limits.max_bytes - len(body))
            if len(body) + len(chunk) > self._limits.max_bytes:
                raise self._too_large(f"more than {self._limits.max_bytes:,}")
            if self._held_bytes + len(chunk) > HELD_BODIES * self._limits.max_bytes:
                raise Unavailable("too many large bodies are being read: retry", retry_after=1.0)
            body += chunk
            self._held_bytes += len(chunk)
        if inflater is not None:
            inflater.finish()

    def _too_large(self, size: str) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body has {size} bytes; the limit is {self._limits.max_bytes:,}")


def _note_user(scope: Scope, body: object) -> None:
    """A caller who says for whom it asks gets the same version of a model for the same user."""
    user = body.get("user") if isinstance(body, dict) else None
    if isinstance(user, str) and user:
        stick_to_user(scope, user)


def stick_to_user(scope: Scope, user: str) -> None:
    """For the rest of the request; users of different keys are different users."""
    sticky_key_context.set(f"{scope_record(scope).client}/{user}")


def _check_url(scope: Scope) -> None:
    num_bytes = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if num_bytes > MAX_URL_BYTES:
        raise UrlTooLong(f"the URL has {num_bytes:,} bytes; the limit is {MAX_URL_BYTES:,}")


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


def _declared_length(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest("Content-Length must be a number of bytes")
    return int(value)


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    media_type, _, parameters = headers.get(b"content-type", b"").decode("latin-1").lower().partition(";")
    media_type = media_type.strip()
    if not (media_type == "application/json" or (media_type.startswith("application/") and "+json" in media_type)):
        raise UnsupportedMediaType("send JSON, with the header `Content-Type: application/json`")
    charset = parameters.partition("charset=")[2].strip(' "')
    if charset not in ("", "utf-8", "utf8"):
        raise UnsupportedMediaType("send JSON as UTF-8")


def _replay(body: bytes, receive: Receive) -> Receive:
    """First the whole body, then what the connection says next (that the client has left)."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
