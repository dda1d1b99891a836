"""A batch: its files, what is asked again, what is kept of a run that ended early."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.batch.lines import BatchError, BatchRequest, check_requests, keep_answers, read_requests
from service.batch.running import run
from service.cli import main
from service.evaluate.asking import Service

Rule = Callable[[httpx.Request], httpx.Response]

ANSWER = {"custom_id": "whole", "response": {"status_code": 200, "body": {}}, "error": None}


def line(custom_id: str, **changed: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/echo", "body": {"input": custom_id}} | changed


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line("b") | {"custom_id": 3}, "line 2: 'custom_id' is to be a text"),
        (line("a"), "line 2: custom_id 'a' is line 1's, too"),
        (line("b", method="GET"), "line 2: 'method' is to be POST, not 'GET'"),
        (line("b", url="http://elsewhere/v1"), "line 2: 'url' is to be an endpoint"),
        (line("b", body=[1]), "line 2: 'body' is to be an object"),
        (line("b", body={"stream": True}), "line 2: 'stream' is not for batches"),
    ],
)
def test_a_line_that_is_wrong_is_named_before_anything_is_asked(
    tmp_path: Path, wrong: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in.jsonl", line("a"), wrong)
    with pytest.raises(BatchError, match=message):
        check_requests(path)
    assert main(["batch", "--input", str(path), "--output", str(tmp_path / "out"), "--url", "http://127.0.0.1:9"]) == 1
    assert message in capsys.readouterr().err


def test_what_is_no_json_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{\n")
    with pytest.raises(BatchError, match="line 1: not JSON"):
        check_requests(tmp_path / "in.jsonl")
    with pytest.raises(BatchError, match="cannot read"):
        check_requests(tmp_path / "nowhere.jsonl")
    with pytest.raises(BatchError, match="has no requests"):
        check_requests(write(tmp_path / "empty.jsonl"))


async def asked(path: Path, rule: Rule, **options: Any) -> tuple[list[dict[str, Any]], Counter[str], list[float]]:
    """The lines that are written, how many of each status, and how long was waited."""
    lines: list[dict[str, Any]] = []
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    service = Service(url="http://service", **{"concurrency": 3, "patience_seconds": 10.0, **options})
    found = await run(service, read_requests(path), lines.append, transport=httpx.MockTransport(rule), sleep=sleep)
    return lines, found, waits


async def test_every_request_has_one_answer_in_the_usual_shape(tmp_path: Path) -> None:
    def rule(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["input"] == "3":
            return httpx.Response(400, json={"error": {"message": "no"}})
        return httpx.Response(
            200, json=body | {"path": request.url.path}, headers={"x-request-id": "r" + body["input"]}
        )

    path = write(tmp_path / "in.jsonl", *(line(str(number)) for number in range(7)))
    lines, found, _ = await asked(path, rule)
    assert found == {"200": 6, "400": 1}
    by_id = {line["custom_id"]: line for line in lines}
    assert sorted(by_id) == [str(number) for number in range(7)]
    assert by_id["2"] == {
        "id": "batch_req_3", "custom_id": "2", "error": None,
        "response": {"status_code": 200, "request_id": "r2", "body": {"input": "2", "path": "/v1/echo"}},
    }  # fmt: skip
    assert by_id["3"]["response"]["status_code"] == 400


async def test_want_of_room_and_of_the_service_itself_are_waited_out(tmp_path: Path) -> None:
    answers = [
        httpx.Response(429, headers={"retry-after": "2"}),
        httpx.Response(503),
        httpx.ConnectError("refused"),
        httpx.Response(200, json={}),
    ]

    def rule(_: httpx.Request) -> httpx.Response:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    lines, found, waits = await asked(write(tmp_path / "in.jsonl", line("a")), rule)
    assert (found, waits) == ({"200": 1}, [2.0, 1.0, 1.0])
    assert len(lines) == 1


async def test_patience_ends_with_an_error_of_the_request_alone(tmp_path: Path) -> None:
    def rule(request: httpx.Request) -> httpx.Response:
        busy = b"busy" in request.content
        return httpx.Response(503, text="full") if busy else httpx.Response(200, json={})

    path = write(tmp_path / "in.jsonl", line("busy"), line("free"))
    lines, found, _ = await asked(path, rule, patience_seconds=3.0)
    assert found == {"no answer": 1, "200": 1}
    (failed,) = [line for line in lines if line["error"]]
    assert failed["error"] == {"code": "no_room", "message": "503: full"}
    assert failed["response"] is None


async def test_a_key_that_is_refused_ends_the_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", *(line(str(number)) for number in range(9)))
    with pytest.raises(ExceptionGroup) as raised:
        await asked(path, lambda _: httpx.Response(401, text="no key"))
    assert raised.group_contains(BatchError, match="answers 401: no key")


def test_what_an_earlier_run_was_answered_stays_and_nothing_else(tmp_path: Path) -> None:
    path = write(
        tmp_path / "out.jsonl",
        ANSWER,
        {"custom_id": "its own fault", "response": {"status_code": 422, "body": {}}, "error": None},
        {"custom_id": "the service's", "response": {"status_code": 500, "body": {}}, "error": None},
        {"custom_id": "none", "response": None, "error": {"code": "no_room", "message": "full"}},
    )
    path.write_text(path.read_text() + '{"custom_id": "torn", "response": {"status_code": 200, "body": {"te')
    assert keep_answers(path) == {"whole", "its own fault"}
    assert [line["custom_id"] for line in read(path)] == ["whole", "its own fault"]
    assert keep_answers(tmp_path / "nowhere.jsonl") == set()


@pytest.mark.parametrize("written", ["notes\n", "[1, 2]\n", json.dumps(line("a")) + "\n", "\n"])
def test_a_file_that_no_batch_has_written_is_left_as_it_is(tmp_path: Path, written: str) -> None:
    """What is no answer was taken out, and so all requests of an input that was given as output."""
    path = tmp_path / "out.jsonl"
    path.write_text(answered := json.dumps(ANSWER) + "\n")
    assert keep_answers(path) == {"whole"}
    path.write_text(answered + written)
    with pytest.raises(BatchError, match=r"out.jsonl, line 2: not an answer of a batch"):
        keep_answers(path)
    assert path.read_text() == answered + written
    assert list(tmp_path.iterdir()) == [path]


def test_answers_do_not_go_where_the_requests_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(request := json.dumps(line("a")))
    assert main(["batch", "--input", str(path), "--output", str(path), "--url", "http://127.0.0.1:9"]) == 1
    assert "in.jsonl is the input" in capsys.readouterr().err
    assert path.read_text() == request


async def test_a_text_that_is_no_unicode_is_for_the_service_to_refuse(tmp_path: Path) -> None:
    def rule(request: httpx.Request) -> httpx.Response:
        sound = json.loads(request.content)["input"].isascii()
        return httpx.Response(200 if sound else 422, json={})

    path = write(tmp_path / "in.jsonl", line("a"), line("\ud800"), line("b"))
    _, found, _ = await asked(path, rule)
    assert found == {"200": 2, "422": 1}


def test_answers_of_any_text_are_written_and_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = write(tmp_path / "in.jsonl", line("\ud800"), line("ü")), tmp_path / "out.jsonl"

    async def answer(_: Service, requests: Iterator[BatchRequest], write: Callable[[Any], None]) -> Counter[str]:
        for request in requests:
            write(request.answered(200, None, {"text": request.custom_id}))
        return Counter({"200": 2})

    monkeypatch.setattr("service.batch.command.run", answer)
    arguments = ["batch", "--input", str(path), "--output", str(output), "--url", "http://127.0.0.1:9"]
    assert main(arguments) == 0
    assert [line["response"]["body"]["text"] for line in read(output)] == ["\ud800", "ü"]
    assert keep_answers(output) == {"\ud800", "ü"}


def test_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail(*_: Any) -> Counter[str]:
        raise ExceptionGroup("tasks", [OSError(28, "No space left on device")])

    monkeypatch.setattr("service.batch.command.run", fail)
    path = write(tmp_path / "in.jsonl", line("a"))
    assert main(["batch", "--input", str(path), "--output", str(tmp_path / "out"), "--url", "http://127.0.0.1:9"]) == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--url", "http://a", "--", "--model", "b"]])
def test_it_is_asked_of_one_service_or_of_one_of_its_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "--input", "in", "--output", "out", *arguments])
    assert "either --url" in capsys.readouterr().err
