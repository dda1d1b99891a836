"""The application around a fake engine: envelope, ids, keys, rates, draining, probes, models, metrics."""

import asyncio
import logging

import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from service.api.state import app_state, request_record
from service.engine.flight import errand_context
from service.errors import DeadlineExceeded, Overloaded, Unavailable
from service.http.anthropic_envelope import AnthropicEnvelope

KEY = {"Authorization": "Bearer sk-alice-0123"}
ADMIN_KEY = {"Authorization": "Bearer root-key-0123"}


class Part(BaseModel, extra="forbid"):
    text: str


class Ask(BaseModel, extra="forbid"):
    prompt: str | list[str] | list[int] = "x"
    number: int = 1
    parts: list[str | Part] = []


@pytest.fixture
def make_app_with_routes(make_app):
    """The application and a few routes that succeed or fail in their own ways."""

    def make(**settings):
        app = make_app(**settings)

        @app.post("/v1/ask")
        async def ask(body: Ask, request: Request) -> Ask:
            record = request_record(request)
            record.model, record.prompt_tokens, record.output_tokens = "tiny", 30, 10
            return body

        @app.post("/v1/late")
        async def late() -> None:
            errand_context.get().prompt_tokens, errand_context.get().output_tokens = 25, 5
            raise DeadlineExceeded("too late")

        @app.get("/fail/{kind}")
        async def fail(kind: str) -> None:
            faults = {"busy": Overloaded("full", retry_after=2.2), "down": Unavailable("restarting")}
            raise faults.get(kind, ZeroDivisionError("of our own making"))

        @app.get("/stream")
        async def stream() -> StreamingResponse:
            async def chunks():
                yield b"one"
                raise ZeroDivisionError("in mid-stream")

            return StreamingResponse(chunks())

        return app

    return make


@pytest.fixture
async def client(make_client, make_app_with_routes):
    return await make_client(make_app_with_routes())


@pytest.fixture
def key_files(tmp_path):
    (tmp_path / "keys").write_text("alice:sk-alice-0123\nbob:sk-bob-012345\n")
    (tmp_path / "admin").write_text("root:root-key-0123\n")
    return {"api_keys_file": tmp_path / "keys", "admin_keys_file": tmp_path / "admin"}


def error_of(response):
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# Faults


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("DELETE", "/version", 405, "method_not_allowed"),
        ("GET", "/fail/busy", 429, "overloaded"),
        ("GET", "/fail/down", 503, "unavailable"),
        ("GET", "/fail/otherwise", 500, "internal_error"),
    ],
)
async def test_every_fault_comes_in_the_envelope(client, method, path, status, code):
    response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


async def test_wrong_method_says_which_are_right(client):
    response = await client.delete("/version")
    assert response.headers["allow"] == "GET"


async def test_all_methods_of_a_path_are_told_though_each_has_a_route_of_its_own(client):
    response = await client.put("/readyz")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD"
    assert error_of(response)["message"].endswith("it takes GET, HEAD")


@pytest.mark.parametrize(("path", "seconds"), [("/fail/busy", "3"), ("/fail/down", "1")])
async def test_what_is_worth_a_retry_says_when_in_whole_seconds(client, path, seconds):
    assert (await client.get(path)).headers["retry-after"] == seconds


async def test_a_layer_that_is_added_is_the_outermost_and_the_framework_has_none_of_its_own(make_client, make_app):
    class Layer:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            scope["path"] = "/livez"
            await self.app(scope, receive, send)

    app = make_app()
    assert type(app.build_middleware_stack()) is AnthropicEnvelope
    app.add_middleware(Layer)
    assert type(app.build_middleware_stack()) is Layer
    assert (await (await make_client(app)).get("/nowhere")).status_code == 200


async def test_unforeseen_fault_is_logged_with_traceback_and_told_without_it(client, caplog):
    with caplog.at_level(logging.ERROR):
        response = await client.get("/fail/otherwise")
    error = error_of(response)
    assert response.headers["x-request-id"] in error["message"]
    assert "of our own making" not in error["message"]
    assert "ZeroDivisionError: of our own making" in caplog.text


async def test_fault_in_mid_stream_leaves_the_stream_unfinished_and_is_logged(make_app_with_routes, caplog):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/stream", "query_string": b"", "headers": []}
    with caplog.at_level(logging.ERROR):
        await make_app_with_routes()(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"] is True
    assert "in mid-stream" in caplog.text


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"number": "x"}, "number", "valid integer"),
        ({"number": None}, "number", "valid integer"),
        ({"prompt": {}}, "prompt", "valid string, or input should be a valid list"),
        ({"prompt": [1, "a"]}, "prompt.0", "valid string"),
        ({"parts": ["a", {"txt": "b"}]}, "parts.1.text", "required"),
        ({"parts": ["a", 5]}, "parts.1", "valid string, or input should be"),
        ({"extra": 1}, "extra", "no such field"),
        ([], None, "should be an object"),
        (None, None, "this field is required"),
    ],
)
async def test_faulty_field_is_named_by_its_path(client, body, param, message):
    response = await client.post("/v1/ask", json=body)
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert (error["code"] == "unsupported_parameter") is (param == "extra")


# Request ids


async def test_callers_request_id_comes_back(client):
    response = await client.get("/version", headers={"X-Request-ID": "trace-1:a/b.c"})
    assert response.headers["x-request-id"] == "trace-1:a/b.c"


@pytest.mark.parametrize("given", ["", "has space", "x" * 129, "<script>", "ümlaut".encode()])
async def test_unfit_request_id_is_replaced(client, given):
    response = await client.get("/version", headers={"X-Request-ID": given})
    assert response.headers["x-request-id"].startswith("req-")


async def test_request_ids_differ(client):
    assert len({(await client.get("/version")).headers["x-request-id"] for _ in range(5)}) == 5


# Keys


@pytest.mark.parametrize(
    "path", ["/v1/models", "/version", "/openapi.json", "/nowhere", "/v1/ask", "/livez/", "/%2Flivez"]
)
async def test_every_path_but_probes_needs_a_key(make_client, make_app_with_routes, key_files, path):
    client = await make_client(make_app_with_routes(**key_files))
    for headers in ({}, {"Authorization": "Bearer wrong-key-1"}, {"Authorization": "Basic sk-alice-0123"}, ADMIN_KEY):
        response = await client.get(path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/health", "/ping", "/"])
async def test_probes_need_no_key(make_client, key_files, path):
    client = await make_client(**key_files)
    assert (await client.get(path)).status_code == (await client.head(path)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health"])
async def test_what_is_sent_to_the_address_of_a_probe_needs_a_key(make_client, key_files, path):
    """`GET /` is a probe of text-embeddings-inference, and `POST /` a task."""
    client = await make_client(**key_files)
    assert (await client.post(path, json={"inputs": "a cat"})).status_code == 401


async def test_metrics_need_a_key_like_all_else_unless_they_are_public(make_client, key_files):
    client = await make_client(**key_files)
    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers=KEY)).status_code == 200
    for settings in (key_files | {"metrics_public": True}, {}):
        client = await make_client(**settings)
        assert (await client.get("/metrics")).status_code == 200


async def test_a_known_key_opens(make_client, key_files):
    client = await make_client(**key_files)
    assert (await client.get("/v1/models", headers=KEY)).status_code == 200
    assert (await client.get("/v1/models", headers={"authorization": "bearer sk-bob-012345"})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "sk-alice-0123"}, 200),
        ({"X-Api-Key": " sk-bob-012345 "}, 200),
        ({"x-api-key": "wrong-key-1"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "sk-alice-0123", "Authorization": "Basic eA=="}, 200),
        (KEY | {"x-api-key": "wrong-key-1"}, 200),
        ({"x-api-key": "sk-alice-0123", "Authorization": "Bearer wrong-key-1"}, 401),
    ],
)
async def test_a_key_may_come_in_a_header_of_its_own_but_a_bearer_token_decides(
    make_client, key_files, headers, status
):
    client = await make_client(**key_files)
    assert (await client.get("/v1/models", headers=headers)).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (KEY, 403),
        (ADMIN_KEY, 404),
        ({"x-api-key": "sk-alice-0123"}, 403),
        ({"x-api-key": "root-key-0123"}, 404),
    ],
)
async def test_management_needs_its_own_key(make_client, key_files, headers, status):
    client = await make_client(**key_files)
    assert (await client.get("/admin/nothing", headers=headers)).status_code == status


async def test_management_is_off_without_its_own_keys(client):
    response = await client.get("/admin/models", headers=KEY)
    assert response.status_code == 403
    assert "--admin-keys-file" in error_of(response)["message"]


# Rates


async def test_requests_beyond_a_keys_rate_get_429_and_all_answers_tell_the_limits(
    make_client, make_app_with_routes, key_files
):
    client = await make_client(make_app_with_routes(**key_files, rate_limit_requests=2))
    first, second, third = [await client.post("/v1/ask", json={}, headers=KEY) for _ in range(3)]
    assert [response.status_code for response in (first, second, third)] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [r.headers["x-ratelimit-remaining-requests"] for r in (first, second, third)] == ["1", "0", "0"]
    assert 29 <= int(third.headers["retry-after"]) <= 30
    assert error_of(third)["code"] == "rate_limit_exceeded"
    other = await client.post("/v1/ask", json={}, headers={"Authorization": "Bearer sk-bob-012345"})
    assert other.status_code == 200


async def test_tokens_that_a_request_used_are_charged_to_its_key(make_client, make_app_with_routes):
    client = await make_client(make_app_with_routes(rate_limit_tokens=70))
    responses = [await client.post("/v1/ask", json={}) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert responses[1].headers["x-ratelimit-remaining-tokens"] == "30"


async def test_a_request_that_ran_out_of_time_is_charged_for_what_it_has_spent(
    make_client, make_app_with_routes, caplog
):
    """It was given back all that it had been charged at the door."""
    client = await make_client(make_app_with_routes(rate_limit_tokens=70))
    with caplog.at_level(logging.INFO, logger="service.access"):
        assert (await client.post("/v1/late", json={})).status_code == 504
    (line,) = [record for record in caplog.records if record.name == "service.access"]
    assert (line.prompt_tokens, line.output_tokens) == (25, 5)
    assert (await client.post("/v1/late")).headers["x-ratelimit-remaining-tokens"] == "40"


async def test_reading_is_not_rate_limited(make_client):
    client = await make_client(rate_limit_requests=1)
    assert [(await client.get("/v1/models")).status_code for _ in range(3)] == [200] * 3


# States and probes


@pytest.mark.parametrize(
    ("state", "live", "started", "ready"),
    [
        ("starting", 200, 503, 503),
        ("ready", 200, 200, 200),
        ("restarting", 200, 200, 503),
        ("draining", 200, 200, 503),
        ("failed", 503, 503, 503),
    ],
)
async def test_probes_tell_the_engines_state(client, engine, state, live, started, ready):
    engine.state = state
    expected = {"/livez": live, "/startupz": started} | dict.fromkeys(("/readyz", "/health", "/ping", "/"), ready)
    for path, status in expected.items():
        response = await client.get(path)
        assert response.status_code == status
        assert response.json()["state"] == state
        assert response.json()["models"] == {"tiny": "ready"}
        assert ("retry-after" in response.headers) is (status == 503)


async def test_the_service_is_not_live_once_nobody_would_start_a_worker_any_more(client, engine):
    engine.state, engine.alive = "ready", False
    assert (await client.get("/livez")).status_code == 503


async def test_from_the_moment_of_draining_new_work_is_refused_and_reading_goes_on(make_client, make_app_with_routes):
    app = make_app_with_routes()
    client = await make_client(app)
    app_state(app).draining = True
    refused = await client.post("/v1/ask", json={})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert refused.headers["connection"] == "close"
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/livez")).status_code == 200
    assert (await client.get("/metrics")).status_code == 200


async def test_a_drain_leaves_the_engine_open_to_requests_that_are_several_calls_of_it(make_client, make_app, engine):
    """The second piece of a long text was refused: the service was draining by then."""
    app = make_app(drain_timeout=60)
    first_call, go_on = asyncio.Event(), asyncio.Event()

    @app.post("/v1/pieces")
    async def pieces() -> str:
        first_call.set()
        await go_on.wait()
        return engine.state

    client = await make_client(app)
    asked = asyncio.ensure_future(client.post("/v1/pieces"))
    await first_call.wait()
    drained = asyncio.ensure_future(app_state(app).drain())
    await asyncio.sleep(0)
    assert (await client.get("/readyz")).json()["state"] == "draining"
    assert (await client.post("/v1/pieces")).status_code == 503
    go_on.set()
    assert (await asked).json() == "ready"
    await drained
    assert engine.state == "draining"


async def test_a_drain_waits_no_longer_than_it_may_for_requests_that_do_not_end(make_client, make_app, engine):
    app = make_app(drain_timeout=0.01)
    begun = asyncio.Event()

    @app.post("/v1/endless")
    async def endless() -> None:
        begun.set()
        await asyncio.Event().wait()

    client = await make_client(app)
    asked = asyncio.ensure_future(client.post("/v1/endless"))
    await begun.wait()
    await app_state(app).drain()
    assert engine.calls == ["drain 0"]
    asked.cancel()


async def test_lifespan_starts_the_engine_then_drains_and_stops_it(make_app, engine):
    app = make_app(drain_timeout=7)
    async with app.router.lifespan_context(app):
        assert engine.calls == ["start"]
    assert engine.calls == ["start", "drain 7", "stop"]


async def test_lifespan_does_not_drain_what_the_server_has_drained(make_app, engine):
    app = make_app()
    async with app.router.lifespan_context(app):
        app_state(app).draining = True
    assert engine.calls == ["start", "stop"]


# What is told


async def test_models_are_listed_in_openais_shape_with_our_fields(client):
    listed = (await client.get("/v1/models")).json()
    card = listed["data"][0]
    assert listed["object"] == "list"
    assert {
        "id": "tiny",
        "object": "model",
        "root": "tiny",
        "parent": None,
        "version": "1",
        "context_length": 512,
        "max_model_len": 512,
        "state": "ready",
    }.items() <= card.items()
    assert card["tasks"] == ["generate", "chat"]
    assert {"weight_bytes", "kv_cache_bytes"} <= set(card)
    assert (await client.get("/v1/models/tiny")).json() == card
    assert (await client.get("/v1/models/tiny@1")).json() == card


async def test_a_further_version_of_a_name_is_listed_under_the_name_to_ask_for_it_by(client, engine):
    engine.models["tiny@2"] = type(engine.models["tiny"])("tiny", version="2")
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["tiny", "tiny@2"]
    assert (await client.get("/v1/models/tiny@2")).json()["version"] == "2"
    assert (await client.get("/v1/models/tiny")).json()["version"] == "1"


async def test_model_names_with_slashes_are_found(client, engine):
    engine.models["owner/model"] = type(engine.models["tiny"])("owner/model")
    assert (await client.get("/v1/models/owner/model")).json()["id"] == "owner/model"


async def test_requests_are_counted_by_route_never_by_path(client):
    await client.get("/v1/models/one")
    await client.get("/v1/models/two")
    await client.get("/nowhere/one")
    await client.post("/v1/ask", content=b"{", headers={"content-type": "application/json"})
    text = (await client.get("/metrics")).text
    assert 'slimpajama_requests_total{endpoint="/v1/models/{name:path}",method="GET",status="404"} 2.0' in text
    assert 'slimpajama_requests_total{endpoint="unmatched",method="GET",status="404"} 1.0' in text
    assert "/nowhere" not in text


async def test_metrics_speak_openmetrics_when_asked(client):
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_each_request_leaves_one_access_line_with_what_its_handler_noted(client, caplog):
    with caplog.at_level(logging.INFO, logger="service.access"):
        await client.post("/v1/ask", json={"prompt": "a secret"}, headers={"X-Request-ID": "r1", **KEY})
    (line,) = [record for record in caplog.records if record.name == "service.access"]
    assert (line.request_id, line.status, line.model, line.prompt_tokens) == ("r1", 200, "tiny", 30)
    assert "secret" not in str(vars(line))
    assert "sk-alice" not in str(vars(line))


async def test_description_names_the_envelope_and_never_422(client):
    schema = (await client.get("/openapi.json")).json()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            reference = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
            name = "MessageFaultAnswer" if path.startswith("/v1/messages") else "ErrorEnvelope"
            assert reference == f"#/components/schemas/{name}"
    assert "HTTPValidationError" not in str(schema)


async def test_cors_is_off_unless_origins_are_given(make_client):
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    closed = await make_client()
    assert "access-control-allow-origin" not in (await closed.get("/version", headers=ask)).headers
    opened = await make_client(cors_origins=["https://app.example"])
    response = await opened.options("/v1/models", headers=ask)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    other = await opened.get("/version", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
