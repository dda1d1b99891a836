"""Takes requests of plain paths straight to their handlers, past the framework's routing and dependencies.

Those cost a third of all that this process does for a short text. A body that its model refuses is answered here, too,
so that it is looked through once. Whatever is out of the ordinary (another method, a path with parts to be read, no
body) goes the framework's way and is answered there as ever. Pure ASGI. Runs in the API process, on the event loop.
"""

import inspect
import typing
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.state import BODY_KEY
from service.errors import ServiceError
from service.http.envelope import fault_of_body
from service.http.faults import answer_service_error, error_response


class Shortcut:
    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._plain = plain_routes(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._plain.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None or BODY_KEY not in scope["state"]:
            await self._app(scope, receive, send)
            return
        route, kind = found
        scope["route"] = route
        request = Request(scope, receive, send)
        response: Response
        try:
            body = kind.validate_python(scope["state"][BODY_KEY])
        except ValidationError as error:
            response = error_response(request, fault_of_body(error, scope["state"][BODY_KEY]))
        else:
            response = await self._answer(route, request, body)
        await response(scope, receive, send)

    @staticmethod
    async def _answer(route: APIRoute, request: Request, body: object) -> Response:
        try:
            response: Response = await route.endpoint(request, body)
        except ServiceError as error:
            return answer_service_error(request, error)
        return response


def plain_routes(routes: Sequence[BaseRoute]) -> dict[str, tuple[APIRoute, TypeAdapter[Any]]]:
    """By their paths, those that the way is short to, and what a body must be."""
    found: dict[str, tuple[APIRoute, TypeAdapter[Any]]] = {}
    for route in routes:
        if isinstance(route, APIRoute) and (kind := _kind_of_body(route)) is not None:
            found.setdefault(route.path, (route, kind))
    return found


def _kind_of_body(route: APIRoute) -> TypeAdapter[Any] | None:
    """A model or a union of them, where a handler takes the request and a body alone, and makes its answer itself."""
    if "POST" not in (route.methods or ()) or route.param_convertors or route.dependencies:
        return None
    hints = typing.get_type_hints(route.endpoint, include_extras=True)
    if list(inspect.signature(route.endpoint).parameters) != ["request", "body"] or hints["return"] is not Response:
        return None
    return TypeAdapter(hints["body"])
