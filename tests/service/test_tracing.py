"""Spans of requests: whose children they are, what they say, which requests have none."""

import logging
import time
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from model.batch import SamplingParams
from service.app import create_app
from service.engine.flight import EncodeFlight, EncodeRequest, Flight, GenerateFlight, GenerateRequest, trace_context
from service.errors import GenerationFailed
from service.otel import OtelTracer, exporter_to
from service.settings import Settings

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = f"00-{TRACE_ID}-{SPAN_ID}"


class Model:
    key = "tiny@1"


def common(accepted: float) -> dict[str, Any]:
    return {
        "number": 1, "model": cast(Any, Model()), "client": "", "priority": 2, "cost_tokens": 9, "num_prompt_tokens": 4,
        "accepted": accepted, "deadline": None,
    }  # fmt: skip


def generate_flight(accepted: float, *, started: float | None = None, first_output: float | None = None) -> Flight:
    request = GenerateRequest(model="tiny@1", prompt_ids=[1], sampling=SamplingParams(max_tokens=1))
    return GenerateFlight(
        request=request, task="chat", started=started, first_output=first_output, num_replays=1, outcome="stop",
        **common(accepted),
    )  # fmt: skip


def encode_flight(accepted: float, started: float) -> Flight:
    request = EncodeRequest(model="tiny@1", output="embedding", inputs=[])
    return EncodeFlight(request=request, results=[], task="embed", started=started, **common(accepted))


class Traced:
    """The application with a tracer, whose spans are kept here."""

    def __init__(self, engine: Any, sample_ratio: float) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer(self._exporter, version="1.2", sample_ratio=sample_ratio)
        self.app = create_app(Settings(), engine, tracer=self.tracer)
        self.flights: list[Flight] = []
        self.add_routes(self.app)

    def add_routes(self, app: FastAPI) -> None:
        @app.post("/v1/fly/{kind}")
        async def fly(kind: str) -> None:
            trace = trace_context.get()
            for flight in self.flights if trace is not None else ():
                trace.add_flight(flight, flight.accepted + 7.0)
            if kind == "fail":
                raise GenerationFailed("a number is not finite")

    def spans(self) -> list[Any]:
        self.tracer.close(10)
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time)


@pytest.fixture
def make_traced(engine):
    return lambda sample_ratio=1.0: Traced(engine, sample_ratio)


async def test_a_request_is_a_server_span_beneath_its_caller_s_and_says_how_it_went(make_client, make_traced):
    traced = make_traced()
    client = await make_client(traced.app)
    headers = {"traceparent": f"{CALLER}-01", "tracestate": "vendor=x", "x-request-id": "r-1"}
    await client.post("/v1/fly/well", headers=headers)
    (span,) = traced.spans()
    assert span.name == "POST /v1/fly/{kind}"
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == SPAN_ID
    assert span.context.trace_state.get("vendor") == "x"
    wanted = {"http.response.status_code": 200, "http.route": "/v1/fly/{kind}", "slimpajama.request_id": "r-1"}
    assert wanted.items() <= span.attributes.items()
    assert span.resource.attributes["service.name"] == "slimpajama"
    assert span.status.status_code is StatusCode.UNSET


async def test_a_fault_of_ours_is_an_error_and_one_of_the_caller_s_is_not(make_client, make_traced):
    traced = make_traced()
    client = await make_client(traced.app)
    await client.post("/v1/fly/fail")
    await client.post("/v1/nowhere")
    failed, refused = traced.spans()
    assert (failed.status.status_code, failed.attributes["error.type"]) == (StatusCode.ERROR, "generation_failed")
    assert (refused.status.status_code, refused.attributes["error.type"]) == (StatusCode.UNSET, "not_found")


@pytest.mark.parametrize(
    ("sample_ratio", "headers", "num_spans"),
    [
        (1.0, {}, 1),
        (0.0, {}, 0),
        (0.0, {"traceparent": f"{CALLER}-01"}, 1),
        (1.0, {"traceparent": f"{CALLER}-00"}, 0),
        (1.0, {"traceparent": "nonsense"}, 1),
    ],
)
async def test_the_caller_decides_what_is_traced_and_else_the_ratio(
    make_client, make_traced, sample_ratio, headers, num_spans
):
    traced = make_traced(sample_ratio)
    traced.flights = [generate_flight(time.monotonic())]
    client = await make_client(traced.app)
    await client.post("/v1/fly/well", headers=headers)
    assert len(traced.spans()) == 3 * num_spans


async def test_probes_and_scrapes_are_not_traced(make_client, make_traced):
    traced = make_traced()
    client = await make_client(traced.app)
    for path in ("/livez", "/readyz", "/startupz", "/health", "/ping", "/", "/metrics"):
        await client.get(path)
    assert traced.spans() == []


@pytest.mark.parametrize(
    ("make_flight", "stages"),
    [
        (lambda now: generate_flight(now, started=now + 1, first_output=now + 3),
         [("queue", 0, 1), ("prefill", 1, 3), ("decode", 3, 7)]),
        (lambda now: generate_flight(now, started=now + 1), [("queue", 0, 1), ("prefill", 1, 7)]),
        (lambda now: generate_flight(now), [("queue", 0, 7)]),
        (lambda now: encode_flight(now, now + 2), [("queue", 0, 2), ("encode", 2, 7)]),
    ],
    ids=["whole", "no-token-came", "never-started", "single-pass"],
)  # fmt: skip
async def test_an_accepted_request_s_way_through_the_engine_is_told_stage_by_stage(
    make_client, make_traced, make_flight, stages
):
    traced = make_traced()
    traced.flights = [make_flight(time.monotonic())]
    await (await make_client(traced.app)).post("/v1/fly/well")
    spans = {span.name: span for span in traced.spans()}
    server, engine = spans.pop("POST /v1/fly/{kind}"), spans.pop("engine")
    assert engine.parent.span_id == server.context.span_id
    assert {"slimpajama.model": "tiny@1", "slimpajama.priority": 2}.items() <= engine.attributes.items()
    found = [
        (name, (span.start_time - engine.start_time) / 1e9, (span.end_time - engine.start_time) / 1e9)
        for name, span in spans.items()
    ]
    assert [entry[0] for entry in found] == [entry[0] for entry in stages]
    for one, other in zip(found, stages, strict=True):
        assert one[1:] == pytest.approx(other[1:], abs=0.01)
    assert all(span.parent.span_id == engine.context.span_id for span in spans.values())


async def test_the_access_line_names_the_trace(make_client, make_traced, caplog):
    traced = make_traced()
    client = await make_client(traced.app)
    with caplog.at_level(logging.INFO, logger="service.access"):
        await client.get("/version", headers={"traceparent": f"{CALLER}-01"})
    (line,) = [record for record in caplog.records if record.name == "service.access"]
    assert line.trace_id == TRACE_ID


@pytest.mark.parametrize("endpoint", ["http://host:4318", "http://host:4318/", "http://host:4318/v1/traces"])
def test_the_collector_s_address_comes_with_or_without_its_path(endpoint):
    assert exporter_to(endpoint)._endpoint == "http://host:4318/v1/traces"


def test_without_a_collector_opentelemetry_is_not_even_imported():
    text = Path(create_app.__code__.co_filename).with_name("serve.py").read_text()
    assert 'import_module("service.otel")' in text
    assert "import opentelemetry" not in text
