"""What the HTTP layer asks of a tracer: a span for each request, which also hears of its ways through the engine.

Knows nothing of OpenTelemetry: `service.otel` does, and is imported only where a collector's address is given. Without
a tracer nothing of this runs. API process, on the event loop.
"""

from collections.abc import Sequence
from typing import Protocol

from service.engine.flight import Trace
from service.logs import RequestRecord

Headers = Sequence[tuple[bytes, bytes]]


class RequestSpan(Trace, Protocol):
    """One traced HTTP request."""

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        ...

    def end(self, record: RequestRecord) -> None: ...


class Tracer(Protocol):
    def begin(self, record: RequestRecord, headers: Headers) -> RequestSpan | None:
        """None: this request is not traced."""
        ...

    def close(self, timeout_seconds: float) -> None:
        """Sends what has not been sent yet; blocks, and gives up after the timeout."""
        ...
