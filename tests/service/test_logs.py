"""Log lines: one per record, readable by people or machines, without prompts and without a caller's line breaks."""

import io
import json
import logging
import logging.handlers
import sys

import pytest

from service import logs
from service.logs import JsonFormatter, RequestRecord, TextFormatter, request_id_context, write_access_line


@pytest.fixture
def make_line():
    def make(formatter, message="hello", *, exc_info=None, **extra):
        record = logging.LogRecord("service.test", logging.INFO, "file", 1, message, (), exc_info)
        vars(record).update(extra)
        return formatter.format(record)

    return make


@pytest.fixture
def record():
    return RequestRecord(request_id="req-1", method="POST", path="/v1/completions", received=100.0)


@pytest.fixture
def configured():
    """The root logger, set up by `configure` onto a buffer, and put back afterwards."""
    root = logging.getLogger()
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx")
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in map(logging.getLogger, names)]
    before.append((root, root.handlers[:], root.level, root.propagate))
    buffer = io.StringIO()
    yield lambda log_format, level="info": logs.configure(log_format, level, buffer) or buffer
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def access_fields(record, buffer, *, now=100.5, log_prompts=False):
    write_access_line(record, now=now, log_prompts=log_prompts)
    return json.loads(buffer.getvalue().splitlines()[-1])


def test_json_line_is_one_object_with_what_was_given(make_line):
    line = make_line(JsonFormatter(), model="tiny", num_tokens=3)
    parsed = json.loads(line)
    assert "\n" not in line
    assert (parsed["message"], parsed["level"], parsed["model"], parsed["num_tokens"]) == ("hello", "info", "tiny", 3)


def test_text_line_shows_what_was_given_and_quotes_what_needs_it(make_line):
    line = make_line(TextFormatter(), model="tiny", reason="two words")
    assert line.endswith('info    service.test hello model=tiny reason="two words"')


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_line_breaks_of_a_caller_do_not_start_lines(make_line, formatter):
    line = make_line(formatter, "path /x\n2026-01-01 error forged\r", path="/y\nforged")
    assert len(line.splitlines()) == 1


def test_json_line_holds_the_traceback(make_line):
    try:
        raise ValueError("broken")
    except ValueError:
        parsed = json.loads(make_line(JsonFormatter(), exc_info=sys.exc_info()))
    assert "ValueError: broken" in parsed["exception"]


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_private_notes_of_a_library_stay_out_of_the_line(make_line, formatter):
    """Ray stamps every record of a process that imports it."""
    line = make_line(formatter, model="tiny", _ray_timestamp_ns=17)
    assert "tiny" in line
    assert "_ray_timestamp_ns" not in line


def test_lines_within_a_request_carry_its_id(make_line):
    token = request_id_context.set("req-7")
    try:
        assert json.loads(make_line(JsonFormatter()))["request_id"] == "req-7"
    finally:
        request_id_context.reset(token)
    assert "request_id" not in json.loads(make_line(JsonFormatter()))


def test_access_line_has_all_that_is_known_in_milliseconds(record, configured):
    record.status, record.client, record.model, record.version, record.task = 200, "alice", "tiny", "2", "chat"
    record.prompt_tokens, record.output_tokens, record.cached_tokens = 10, 20, 5
    record.queue_seconds, record.first_token_seconds, record.finish_reason = 0.001, 0.25, "stop"
    fields = access_fields(record, configured("json"))
    assert {name: fields[name] for name in list(fields)[3:]} == {
        "message": "request",
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "key": "alice",
        "model": "tiny@2",
        "task": "chat",
        "prompt_tokens": 10,
        "cached_tokens": 5,
        "output_tokens": 20,
        "queue_ms": 1.0,
        "ttft_ms": 250.0,
        "total_ms": 500.0,
        "finish_reason": "stop",
    }


def test_access_line_reaches_handlers_that_others_have_added_and_says_the_same(record, configured):
    record.status, record.first_token_seconds = 200, 0.0
    alone = access_fields(record, configured("json"))
    buffer, other = configured("json"), logging.handlers.MemoryHandler(10)
    logging.getLogger().addHandler(other)
    beside = access_fields(record, buffer)
    assert {**beside, "time": ""} == {**alone, "time": ""}
    assert beside["ttft_ms"] == 0.0
    assert [line.getMessage() for line in other.buffer] == ["request"]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompt_is_written_only_when_asked_for(record, configured, log_prompts):
    record.prompt = "my secret"
    fields = access_fields(record, configured("json"), log_prompts=log_prompts)
    assert ("prompt" in fields) is log_prompts


def test_probes_are_written_at_debug_level_only(record, configured):
    record.path = "/readyz"
    buffer = configured("json", "info")
    write_access_line(record, now=101.0, log_prompts=False)
    assert buffer.getvalue() == ""
    buffer = configured("json", "debug")
    assert access_fields(record, buffer)["path"] == "/readyz"


def test_level_silences_what_is_less_severe(record, configured):
    buffer = configured("text", "error")
    write_access_line(record, now=101.0, log_prompts=False)
    assert buffer.getvalue() == ""


def test_uvicorns_own_access_log_is_silent_and_its_errors_are_ours(configured):
    buffer = configured("json")
    logging.getLogger("uvicorn.access").info("GET /")
    logging.getLogger("uvicorn.error").warning("something")
    assert [json.loads(line)["message"] for line in buffer.getvalue().splitlines()] == ["something"]
