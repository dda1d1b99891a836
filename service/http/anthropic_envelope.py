"""Errors of the Messages API as Anthropic's clients expect them: `{"type": "error", "error": {"type", "message"}}`.

A layer around all others, so that whoever refuses a request of these paths (no key, too large, not JSON, no such field)
does so in this envelope, and so that every answer has its id in the header that these clients read. Knows paths and
errors alone. Pure ASGI. Runs in the API process, on the event loop.
"""

from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError
from service.http.envelope import envelope_context
from service.logs import request_id_context

PREFIX = "/v1/messages"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's names by status; what is left is an `invalid_request_error`."""


def anthropic_error_body(error: ServiceError) -> dict[str, Any]:
    """There is no place for the field at fault but the beginning of the message."""
    message, param = error.message, error.param
    if param is not None and not message.startswith(param):
        message = f"{param}: {message}"
    return {
        "type": "error",
        "error": {"type": TYPES.get(error.status, "invalid_request_error"), "message": message},
        "request_id": request_id_context.get(),
    }


class AnthropicEnvelope:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_of_messages(scope["path"]):
            await self._app(scope, receive, send)
            return

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                ids = [(b"request-id", value) for name, value in message["headers"] if name == b"x-request-id"]
                message["headers"] = [*message["headers"], *ids]
            return send(message)

        token = envelope_context.set(anthropic_error_body)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            envelope_context.reset(token)


def is_of_messages(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")
