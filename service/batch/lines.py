"""The files of a batch, as OpenAI's batches and vLLM's `run-batch` have them: a request a line, an answer a line.

    {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "..."}}
    {"id": "batch_req_1", "custom_id": "a", "error": null,
     "response": {"status_code": 200, "request_id": "...", "body": {...}}}

Knows nothing of asking. Runs in the batch's process.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_FAULT_OF_ITS_OWN = 500
"""Statuses from here on are not the request's fault: it is asked again when the batch is run again."""


class BatchError(Exception):
    """A file, the service or the command line is not what it should be; the message says which and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    number: int
    """Of its line, from 1."""
    custom_id: str
    url: str
    body: dict[str, Any]

    def answered(self, status: int, request_id: str | None, body: Any) -> dict[str, Any]:
        response = {"status_code": status, "request_id": request_id, "body": body}
        return self._line(response=response, error=None)

    def failed(self, code: str, message: str) -> dict[str, Any]:
        """No answer came."""
        return self._line(response=None, error={"code": code, "message": message})

    def _line(self, **fields: Any) -> dict[str, Any]:
        return {"id": f"batch_req_{self.number}", "custom_id": self.custom_id, **fields}


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """Line by line. Raises: BatchError that names the line."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _request(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"cannot read {path}: {error}") from error


def check_requests(path: Path) -> set[str]:
    """Their ids: all lines are looked at before the first is asked. Raises: BatchError."""
    seen: dict[str, int] = {}
    for request in read_requests(path):
        first = seen.setdefault(request.custom_id, request.number)
        if first != request.number:
            raise BatchError(f"{path}, line {request.number}: custom_id {request.custom_id!r} is line {first}'s, too")
    if not seen:
        raise BatchError(f"{path} has no requests")
    return set(seen)


def keep_answers(path: Path) -> set[str]:
    """The ids of the requests that an earlier run has had answered; other answers are taken out of the file: none, one
    that the request is not to blame for, and what was being written when the run ended.

    Raises: BatchError, and leaves the file as it is, if it has lines that no batch has written.
    """
    if not path.exists():
        return set()
    known: set[str] = set()
    partial = path.with_name(f"{path.name}.partial")
    with path.open(encoding="utf-8", errors="replace") as file, partial.open("w", encoding="utf-8") as kept:
        for number, line in enumerate(file, start=1):
            try:
                custom_id = _answered_id(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    continue
                partial.unlink()
                raise BatchError(f"{path}, line {number}: not an answer of a batch; it would be lost") from error
            if custom_id is not None and custom_id not in known:
                known.add(custom_id)
                kept.write(line)
    partial.replace(path)
    return known


def _answered_id(line: str) -> str | None:
    """None: no answer has come yet. Raises: ValueError for what is no line of a batch's answers."""
    row = json.loads(line)
    if not isinstance(row, dict) or not {"custom_id", "response", "error"} <= row.keys():
        raise ValueError("no answer")
    response, custom_id = row["response"], row["custom_id"]
    status = response.get("status_code") if isinstance(response, dict) else None
    if not (isinstance(status, int) and isinstance(custom_id, str) and line.endswith("\n")):
        return None
    return custom_id if status < FIRST_FAULT_OF_ITS_OWN else None


def _request(path: Path, number: int, line: str) -> BatchRequest:
    def wrong(what: str) -> BatchError:
        return BatchError(f"{path}, line {number}: {what}")

    try:
        row = json.loads(line)
    except ValueError as error:
        raise wrong(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise wrong("not an object")
    custom_id, method, url, body = (row.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise wrong("'custom_id' is to be a text")
    if method != "POST":
        raise wrong(f"'method' is to be POST, not {method!r}")
    if not isinstance(url, str) or not url.startswith("/"):
        raise wrong("'url' is to be an endpoint, like /v1/chat/completions")
    if not isinstance(body, dict):
        raise wrong("'body' is to be an object")
    if body.get("stream"):
        raise wrong("'stream' is not for batches: an answer is one line")
    return BatchRequest(number=number, custom_id=custom_id, url=url, body=body)
