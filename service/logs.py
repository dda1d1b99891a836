"""Structured log lines, as text or as JSON, and the one access line that each request leaves.

Handlers fill the request's `RequestRecord`; the outermost middleware writes it. Prompts appear only where `log_prompts`
asks for it, keys never. Knows nothing of HTTP frameworks. Runs in the API process; the worker calls `configure` too.
"""

import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

request_id_context: ContextVar[str] = ContextVar("request_id", default="")
"""Set for the length of a request, so that every line logged meanwhile carries its id."""
REQUEST_ID = r"[A-Za-z0-9._:/+=-]{1,128}"
"""What a caller may name a request: harmless in a header and in a log line."""

access_logger = logging.getLogger("service.access")

QUIET_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/metrics"})
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_SPECIAL = frozenset(' "=\\')
"""What a value that has it is put into quotes for."""
_NUMBERS = frozenset({int, float, bool})


@dataclass(slots=True)
class RequestRecord:
    """What one HTTP request was and how it went. Times: `received` in `time.monotonic()` seconds, others durations."""

    request_id: str
    method: str
    path: str
    received: float
    trace_id: str = ""
    """Where the request is traced."""
    client: str = ""
    """The name of the API key; "" without keys."""
    endpoint: str = ""
    status: int = 0
    model: str = ""
    version: str = ""
    task: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    finish_reason: str = ""
    error: str = ""
    """The error's code."""
    prompt: str | None = None
    """Set it always; it is written only where `log_prompts` is on."""

    def charged_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def fields(self, *, total_seconds: float, log_prompts: bool) -> dict[str, object]:
        """The access line: what is known, in reading order, times in milliseconds."""
        known: dict[str, object] = {
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "key": self.client,
            "model": f"{self.model}@{self.version}" if self.model and self.version else self.model,
            "task": self.task,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "queue_ms": _milliseconds(self.queue_seconds),
            "ttft_ms": _milliseconds(self.first_token_seconds),
            "total_ms": _milliseconds(total_seconds),
            "finish_reason": self.finish_reason,
            "error": self.error,
            "prompt": self.prompt if log_prompts else None,
        }
        return {name: value for name, value in known.items() if value or type(value) is float}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000.0, 2)


def write_access_line(record: RequestRecord, *, now: float, log_prompts: bool) -> None:
    """Probes and scrapes come every second, and are written at debug level."""
    level = logging.DEBUG if record.path in QUIET_PATHS else logging.INFO
    if not access_logger.isEnabledFor(level):
        return
    fields = record.fields(total_seconds=now - record.received, log_prompts=log_prompts)
    handler = _only_handler()
    if handler is not None:
        handler.write_line(level, access_logger.name, "request", fields)
    else:
        line = access_logger.makeRecord(access_logger.name, level, __file__, 0, "request", (), None, extra=fields)
        access_logger.handle(line)


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes records, and lines that need not be records first: making one takes longer than all the rest."""

    formatter: "LineFormatter"

    def write_line(self, level: int, logger: str, message: str, fields: dict[str, object]) -> None:
        with self.lock or nullcontext():
            try:
                line = self.formatter.line(time.time(), logging.getLevelName(level), logger, message, fields)
                self.stream.write(line + self.terminator)
                self.flush()
            except Exception:
                self.handleError(logging.makeLogRecord({"name": logger, "levelno": level, "msg": message}))


def _only_handler() -> LineHandler | None:
    """The handler that `configure` put in place, where nobody has added any or removed it."""
    handlers = logging.getLogger().handlers
    alone = len(handlers) == 1 and not access_logger.handlers and access_logger.propagate
    return handlers[0] if alone and isinstance(handlers[0], LineHandler) else None


class LineFormatter(logging.Formatter, ABC):
    """What a record was given as `extra` is part of its line."""

    @abstractmethod
    def line(
        self, seconds: float, level: str, logger: str, message: str, fields: dict[str, object], traceback: str = ""
    ) -> str:
        """`seconds` since the epoch."""

    def format(self, record: logging.LogRecord) -> str:
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        fields = _extra_fields(record)
        return self.line(record.created, record.levelname, record.name, record.getMessage(), fields, traceback)


class JsonFormatter(LineFormatter):
    """One JSON object per line."""

    def line(
        self, seconds: float, level: str, logger: str, message: str, fields: dict[str, object], traceback: str = ""
    ) -> str:
        line = {"time": _time(seconds), "level": level.lower(), "logger": logger, "message": message, **fields}
        if traceback:
            line["exception"] = traceback
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(LineFormatter):
    """`2026-01-31T10:00:00.000+00:00 info service.access request status=200 ...`, then a traceback if there is one."""

    def line(
        self, seconds: float, level: str, logger: str, message: str, fields: dict[str, object], traceback: str = ""
    ) -> str:
        said = "".join([f" {name}={_quoted(value)}" for name, value in fields.items()])
        line = f"{_time(seconds)} {level.lower():<7} {logger} {_one_line(message)}{said}"
        return f"{line}\n{traceback}" if traceback else line


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """What a caller gave; libraries that make records of their own (Ray does) keep private notes on them."""
    fields = {
        name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES and name[:1] != "_"
    }
    request_id = request_id_context.get()
    return {"request_id": request_id, **fields} if request_id else fields


def _quoted(value: object) -> str:
    text = str(value)
    if type(value) in _NUMBERS:
        return text
    plain = text.isprintable() and _SPECIAL.isdisjoint(text)
    return text if plain and text else json.dumps(text)


def _one_line(message: str) -> str:
    """Callers put what they were sent into messages: a line break must not start a line of the caller's own making."""
    return message if message.isprintable() else message.replace("\r", "\\r").replace("\n", "\\n")


def configure(log_format: LogFormat, level: str, stream: TextIO | None = None) -> None:
    """Sends every logger of the process through one handler. Uvicorn's own access log is replaced by ours."""
    handler = LineHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
    for name in ("uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
