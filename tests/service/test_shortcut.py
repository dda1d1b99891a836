"""The way past the framework: which requests take it, and that it changes nothing but the time they take."""

import pytest
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.api.state import BODY_KEY, RECORD_KEY
from service.app import ROUTERS
from service.errors import Unavailable
from service.http.shortcut import Shortcut, plain_routes
from service.logs import RequestRecord

router = APIRouter(prefix="/v1")


class Ask(BaseModel, extra="forbid"):
    number: int = 1


@router.post("/double")
async def double(request: Request, body: Ask) -> Response:
    if body.number == 0:
        raise Unavailable("no nothing")
    return Response(f"{request.url.path} {2 * body.number}")


@router.post("/model")
async def answer_by_model(request: Request, body: Ask) -> Ask:
    raise AssertionError("the framework makes the answer of what this returns")


@router.post("/part/{name}")
async def read_from_path(request: Request, body: Ask) -> Response:
    raise AssertionError("the framework reads the path")


@pytest.fixture
def ask():
    """await ask(path, body): the messages that were sent, or None where the request went the framework's way."""

    async def send_request(path, body=None, method="POST"):
        sent, seen = [], []

        async def framework(scope, receive, send):
            seen.append(scope)

        async def receive():
            raise AssertionError("the body has been read")

        async def send(message):
            sent.append(message)

        state = {RECORD_KEY: RequestRecord("req-1", method, path, 0.0)} | ({} if body is None else {BODY_KEY: body})
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "state": state}
        await Shortcut(framework, router.routes)(scope, receive, send)
        assert bool(seen) != bool(sent)
        assert ("route" in scope) == bool(sent)
        return sent or None

    return send_request


async def test_a_sound_request_reaches_its_handler_without_the_framework(ask):
    start, body = await ask("/v1/double", {"number": 21})
    assert start["status"] == 200
    assert body["body"] == b"/v1/double 42"


async def test_a_fault_that_a_handler_raises_is_in_the_envelope(ask):
    start, body = await ask("/v1/double", {"number": 0})
    assert start["status"] == 503
    assert b"retry-after" in dict(start["headers"])
    assert b'"message": "no nothing"' in body["body"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"number": "many"}, b"number: input should be a valid integer"),
        ({"unknown": 1}, b"unknown: there is no such field"),
        ([1], b"the body: input should be an object"),
    ],
)
async def test_a_body_that_is_refused_is_looked_through_once(ask, body, message):
    start, answer = await ask("/v1/double", body)
    assert start["status"] == 400
    assert message in answer["body"]


@pytest.mark.parametrize(
    ("path", "body", "method"),
    [
        ("/v1/double", None, "POST"),
        ("/v1/double", {"number": 1}, "PUT"),
        ("/v1/triple", {"number": 1}, "POST"),
        ("/v1/model", {"number": 1}, "POST"),
        ("/v1/part/one", {"number": 1}, "POST"),
        ("/v1/part/{name}", {"number": 1}, "POST"),
    ],
)
async def test_whatever_is_out_of_the_ordinary_goes_the_frameworks_way(ask, path, body, method):
    assert await ask(path, body, method) is None


def test_the_tasks_handlers_are_all_of_the_plain_kind():
    """One that took more than a request and a body would be left out, and nobody would notice."""
    plain = plain_routes([route for one in ROUTERS for route in one.routes])
    assert {"/v1/embeddings", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/embed"} <= set(plain)
    assert {"/rerank", "/tokenize"} <= set(plain), "those whose body is of one shape or another"
