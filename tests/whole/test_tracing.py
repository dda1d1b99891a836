"""Traces of the running service, read by a collector of the test's own."""

import asyncio
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.whole.conftest import MakeService, stream

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, as OpenTelemetry's collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str) -> Any:
        (span,) = [span for span in self.spans if span.name == name]
        return span


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in span.attributes}


@pytest.mark.slow
async def test_a_traced_stream_is_one_tree_from_the_caller_to_the_decode_and_says_that_it_was_replayed(
    make_service: MakeService, cases: list[dict[str, Any]], collector: Collector
) -> None:
    service = await make_service("--otlp-endpoint", collector.endpoint, "--trace-ratio", "0")
    service.client.headers["traceparent"] = f"00-{TRACE_ID}-{SPAN_ID}-01"
    task = asyncio.ensure_future(stream(service, cases[0]))
    while await service.metric("generated_tokens_total") < 3:  # noqa: ASYNC110 - the test's own time limit bounds it
        await asyncio.sleep(0.01)
    service.worker.send_signal(signal.SIGKILL)
    assert await task == (cases[0]["text"], "length", True)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 60) == 0
    server, engine = collector.named("POST /v1/completions"), collector.named("engine")
    stages = [collector.named(name) for name in ("queue", "prefill", "decode")]
    assert {span.trace_id.hex() for span in (server, engine, *stages)} == {TRACE_ID}
    assert server.parent_span_id.hex() == SPAN_ID
    assert engine.parent_span_id == server.span_id
    assert {span.parent_span_id for span in stages} == {engine.span_id}
    usage = {"gen_ai.usage.input_tokens": len(cases[0]["prompt_ids"]), "gen_ai.response.model": "stories"}
    assert usage.items() <= attributes(server).items()
    assert attributes(engine)["slimpajama.output_tokens"] == len(cases[0]["new_ids"])
    assert attributes(engine)["slimpajama.replays"] >= 1
    times = [time for span in stages for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    assert server.start_time_unix_nano <= times[0]
    assert times[-1] <= server.end_time_unix_nano


@pytest.mark.slow
async def test_a_collector_that_is_away_costs_spans_and_nothing_else(
    make_service: MakeService, cases: list[dict[str, Any]]
) -> None:
    service = await make_service("--otlp-endpoint", "http://127.0.0.1:9")
    assert await stream(service, cases[0]) == (cases[0]["text"], "length", True)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 60) == 0
