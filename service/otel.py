"""Tracing by OpenTelemetry (`pip install "slimpajama[otel]"`): W3C trace context in, spans out by OTLP over HTTP.

A request's server span has a child for each of its ways through the engine, and that one has `queue`, `prefill` and
`decode` (single-pass work: `queue` and `encode`), made at its end from the times that the engine keeps. Spans are sent
from a thread of the library's own; a collector that is away costs spans and nothing else. What `--otlp-endpoint` does
not say (headers, certificates, resource attributes), the library reads from its own OTEL_* variables. API process.
"""

import threading
import time

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from service.engine.flight import EncodeFlight, Flight
from service.http.gate import METRICS, is_probe
from service.logs import RequestRecord
from service.tracing import Headers, RequestSpan

TRACES_PATH = "/v1/traces"
EXPORT_TIMEOUT_SECONDS = 5.0
CONTEXT_HEADERS = {b"traceparent": "traceparent", b"tracestate": "tracestate"}
OPERATIONS = {"generate": "text_completion", "chat": "chat", "embed": "embeddings"}
"""Our tasks by the names of OpenTelemetry's conventions for generative AI; the others keep their own."""


def exporter_to(endpoint: str) -> SpanExporter:
    """`endpoint` is the collector's address, with or without the path of its traces."""
    base = endpoint.rstrip("/")
    url = base if base.endswith(TRACES_PATH) else base + TRACES_PATH
    return OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_SECONDS)


class OtelTracer:
    """Implements `Tracer`. Registers nothing globally."""

    def __init__(self, exporter: SpanExporter, *, version: str, sample_ratio: float) -> None:
        """`sample_ratio` is the share traced of the requests whose caller has not decided."""
        resource = Resource({"service.name": "slimpajama", "service.version": version})
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=resource.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("slimpajama", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, headers: Headers) -> RequestSpan | None:
        if is_probe(record.method, record.path) or record.path == METRICS:  # asked every second, by machines
            return None
        carrier = {CONTEXT_HEADERS[name]: value.decode("latin-1") for name, value in headers if name in CONTEXT_HEADERS}
        span = self._tracer.start_span(record.method, context=self._propagator.extract(carrier), kind=SpanKind.SERVER)
        return OtelSpan(self._tracer, span) if span.is_recording() else None

    def close(self, timeout_seconds: float) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(timeout_seconds)


class OtelSpan:
    """Implements `RequestSpan`."""

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span)

    @property
    def trace_id(self) -> str:
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def end(self, record: RequestRecord) -> None:
        self._span.update_name(f"{record.method} {record.endpoint}")
        attributes: dict[str, AttributeValue] = {
            "http.request.method": record.method,
            "http.route": record.endpoint,
            "url.path": record.path,
            "http.response.status_code": record.status,
            "slimpajama.request_id": record.request_id,
            "slimpajama.key": record.client,
            "gen_ai.operation.name": OPERATIONS.get(record.task, record.task),
            "gen_ai.response.model": record.model,
            "slimpajama.model_version": record.version,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "gen_ai.response.finish_reasons": record.finish_reason.split(",") if record.finish_reason else "",
            "error.type": record.error,
        }
        self._span.set_attributes({name: value for name, value in attributes.items() if value not in ("", 0)})
        if record.status >= 500 or (record.error and record.status < 400):
            self._span.set_status(Status(StatusCode.ERROR, record.error))
        self._span.end()

    def add_flight(self, flight: Flight, ended: float) -> None:
        offset = time.time_ns() - time.monotonic_ns()

        def epoch_ns(monotonic_seconds: float) -> int:
            """Spans want the time of day; one and the same moment is so twice."""
            return offset + int(monotonic_seconds * 1e9)

        attributes: dict[str, AttributeValue] = {
            "slimpajama.task": flight.task,
            "slimpajama.model": flight.model.key,
            "slimpajama.outcome": flight.outcome or "",
            "slimpajama.prompt_tokens": flight.num_prompt_tokens,
            "slimpajama.cached_tokens": flight.num_cached_tokens,
            "slimpajama.output_tokens": flight.num_output_tokens,
            "slimpajama.replays": flight.num_replays,
            "slimpajama.priority": flight.priority,
        }
        span = self._tracer.start_span(
            "engine", context=self._context, attributes=attributes, start_time=epoch_ns(flight.accepted)
        )
        if flight.error is not None:
            span.set_status(Status(StatusCode.ERROR, flight.error.message))
        context = trace.set_span_in_context(span)
        for name, start, end in stages(flight, ended):
            child = self._tracer.start_span(name, context=context, start_time=epoch_ns(start))
            child.end(end_time=epoch_ns(end))
        span.end(end_time=epoch_ns(ended))


def stages(flight: Flight, ended: float) -> list[tuple[str, float, float]]:
    """What a flight went through, with begin and end; one that never got further has fewer."""
    if flight.started is None:
        return [("queue", flight.accepted, ended)]
    found = [("queue", flight.accepted, flight.started)]
    if isinstance(flight, EncodeFlight):
        return [*found, ("encode", flight.started, ended)]
    if flight.first_output is None:
        return [*found, ("prefill", flight.started, ended)]
    return [*found, ("prefill", flight.started, flight.first_output), ("decode", flight.first_output, ended)]
