"""Maps whatever a handler raises to the one error envelope, and leaves its code in the request's record.

Only `create_app` installs these. Faults that nobody foresaw are `service.http.entry`'s. Runs in the API process.
"""

import logging
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from service.api.state import request_record
from service.errors import Forbidden, InvalidRequest, NotFound, PayloadTooLarge, ServiceError, Unauthorized
from service.http.envelope import UnsupportedMediaType, encode_error, error_headers, validation_error

log = logging.getLogger(__name__)


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


_BY_STATUS: dict[int, type[ServiceError]] = {
    error.status: error
    for error in (
        InvalidRequest, Unauthorized, Forbidden, NotFound, MethodNotAllowed, PayloadTooLarge, UnsupportedMediaType
    )
}  # fmt: skip


def install_fault_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """`routes` tell which methods a path takes."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        return _answer_framework_fault(request, error, routes)

    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def error_response(request: Request, error: ServiceError, headers: dict[str, str] | None = None) -> Response:
    request_record(request).error = error.code or ""
    response = Response(encode_error(error), status_code=error.status, media_type="application/json")
    for name, value in error_headers(error):
        response.raw_headers.append((name, value))
    response.headers.update(headers or {})
    return response


def answer_service_error(request: Request, error: ServiceError) -> Response:
    if error.status == 500:
        log.warning("request failed: %s", error.message, extra={"code": error.code})
    return error_response(request, error)


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return answer_service_error(request, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request, validation_error(error.errors(), error.body))


def _answer_framework_fault(request: Request, error: Exception, routes: Sequence[BaseRoute]) -> Response:
    """What the framework itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            message = f"there is no {request.method} {request.url.path[:200]}; /docs lists what there is"
        case 405:
            allowed = headers["Allow"] = _methods_of(request, routes) or headers.get("Allow", "")
            message = f"{request.url.path[:200]} does not take {request.method}; it takes {allowed}"
        case _:
            message = str(error.detail)
    fault = _BY_STATUS.get(error.status_code, InvalidRequest if error.status_code < 500 else ServiceError)(message)
    fault.status = error.status_code
    return error_response(request, fault, headers)


def _methods_of(request: Request, routes: Sequence[BaseRoute]) -> str:
    """One path may have a route for each method, and the framework tells those of the first alone."""
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in matching for method in getattr(route, "methods", None) or ()}))
