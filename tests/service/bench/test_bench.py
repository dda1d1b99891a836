"""The benchmark tool: the same work for each server, figures that are what they say, failures that are counted."""

import asyncio
import contextlib
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from service.bench.command import main, make_parser
from service.bench.http import Connection
from service.bench.load import Record, closed_loop, send
from service.bench.report import Limits, figures, percentile, table
from service.bench.workload import Workload, poisson_jobs, read_prompts, trace_jobs

TRACE = Path(__file__).parents[4] / "shared/data/traces/azure-llm-2023/AzureLLMInferenceTrace_conv.csv.gz"


def test_percentiles_are_those_of_numpy() -> None:
    values = list(np.random.default_rng(0).normal(size=57))
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_the_same_seed_gives_the_same_work_and_no_prompt_twice() -> None:
    workload = Workload(prompt_tokens=16, output_tokens=4, token_ids=(3, 500), seed=7)
    first = [job.body for job in itertools.islice(workload.jobs(), 20)]
    assert first == [job.body for job in itertools.islice(workload.jobs(), 20)]
    assert len(set(first)) == 20
    assert all(len(json.loads(body)["prompt"]) == 16 for body in first)


def test_poisson_arrivals_have_the_rate_asked_for() -> None:
    jobs = poisson_jobs(Workload(prompt_tokens=1), rate=50.0, count=2000)
    assert jobs[-1].at_seconds == pytest.approx(40.0, rel=0.1)
    assert all(a.at_seconds < b.at_seconds for a, b in itertools.pairwise(jobs))


def test_a_trace_is_replayed_with_its_lengths_and_gaps() -> None:
    if not TRACE.exists():
        pytest.skip("the Azure trace is not in ../shared/data")
    jobs = trace_jobs(Workload(token_ids=(0, 9)), TRACE, count=5, speed=2.0, max_tokens=10_000)
    bodies = [json.loads(job.body) for job in jobs]
    assert [len(body["prompt"]) for body in bodies] == [374, 396, 879, 91, 91]
    assert [body["max_tokens"] for body in bodies] == [44, 109, 55, 16, 16]
    assert jobs[0].at_seconds == 0.0


def test_prompts_are_read_from_lines_and_from_jsonl(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\ntwo\n")
    rows.write_text('{"question": "why?"}\n{"text": "so"}\n')
    assert read_prompts(lines) == ("one", "two")
    assert read_prompts(rows) == ("why?", "so")


def test_goodput_counts_only_those_that_met_every_limit() -> None:
    fast = Record(sent=0.0, finished=1.0, chunk_times=[0.1, 0.2], num_output_tokens=2)
    slow = Record(sent=0.0, finished=2.0, chunk_times=[0.9, 1.9], num_output_tokens=2)
    failed = Record(sent=0.0, finished=0.1, status=429, error="busy")
    found = figures("x", [fast, slow, failed], Limits(first_token_seconds=0.5))
    assert found.goodput_requests_per_second == pytest.approx(0.5)
    head, _, row = (line.split("|") for line in table([found]).splitlines())
    assert row[head.index(" good req/s ")] == " 0.5 "
    assert (found.failed, found.rejected) == (1, 1)
    assert found.output_tokens_per_second == pytest.approx(2.0)
    assert found.inter_token_seconds["p50"] == pytest.approx(0.55)


STREAM = (
    b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"b"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


async def _serve(
    answer: bytes, status: str = "200 OK", opened: list[asyncio.StreamWriter] | None = None
) -> tuple[asyncio.Server, str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if opened is not None:
            opened.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
                length = next(int(line.split(b":")[1]) for line in head if line.startswith(b"content-length"))
                await reader.readexactly(length)
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(("status", "code", "failed"), [("200 OK", 0, 0), ("500 Bad", 1, 8), ("429 Busy", 0, 8)])
async def test_the_command_measures_a_server_and_says_what_failed(
    tmp_path: Path, status: str, code: int, failed: int
) -> None:
    server, url = await _serve(STREAM, status)
    page, data = tmp_path / "page.html", tmp_path / "figures.json"
    arguments = ["--url", url, "--concurrency", "1,2", "--json", str(data), "--page", str(page), "--warm-up", "0"]
    assert await asyncio.to_thread(main, arguments) == code
    server.close()
    await server.wait_closed()
    runs = json.loads(data.read_text())["runs"]
    assert [run["label"] for run in runs] == ["c=1", "c=2"]
    assert [run["failed"] for run in runs] == [failed, failed]
    if not failed:
        assert all(run["output_tokens_per_second"] * run["seconds"] == pytest.approx(16) for run in runs)
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(("status", "connections"), [("200 OK", 2), ("200 OK\r\nConnection: close", 12)])
async def test_a_client_keeps_its_connection_unless_the_server_closes_it(status: str, connections: int) -> None:
    """The client had asked the parser too late whether it may, and opened one for every request."""
    opened: list[asyncio.StreamWriter] = []
    server, url = await _serve(STREAM, status, opened)
    records = await closed_loop(url, {}, Workload().jobs(), concurrency=2, count=12)
    server.close()
    assert [record.error for record in records] == [None] * 12
    assert len(opened) == connections


async def test_a_kept_connection_that_the_server_closes_is_opened_anew() -> None:
    opened: list[asyncio.StreamWriter] = []
    server, url = await _serve(STREAM, opened=opened)
    connection = Connection(url, {})
    job = next(Workload().jobs())
    assert (await send(connection, job)).error is None
    opened[0].transport.abort()
    assert (await send(connection, job)).error is None
    await connection.aclose()
    server.close()
    assert len(opened) == 2


CHAT = b"".join(
    b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
    for choice in (
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"reasoning_content": "a"}},
        {"delta": {"content": "b"}},
        {"delta": {"tool_calls": [{"index": 0}]}},
        {"delta": {}, "finish_reason": "stop"},
    )
)


async def test_only_what_shows_text_counts_as_a_piece_of_the_answer() -> None:
    """The role alone and the reason alone are sent beside a token: they made gaps of nothing."""
    server, url = await _serve(CHAT + b"data: [DONE]\n\n")
    (record,) = await closed_loop(url, {}, Workload().jobs(), concurrency=1, count=1)
    server.close()
    assert (record.error, record.num_output_tokens, len(record.chunk_times)) == (None, 3, 3)


@pytest.mark.parametrize("answer", [CHAT, CHAT + b"data: half an eve\n\n", b"data: x\n\n"])
async def test_a_stream_without_its_end_is_a_failure(answer: bytes) -> None:
    server, url = await _serve(answer)
    (record,) = await closed_loop(url, {}, Workload().jobs(), concurrency=1, count=1)
    server.close()
    assert record.error


@pytest.mark.parametrize(
    ("answer", "is_whole"), [(CHAT, True), (CHAT[: CHAT.index(b'{"choices": [{"delta": {}')], False)]
)
async def test_a_server_may_end_its_streams_by_their_reason_where_that_is_said(answer: bytes, is_whole: bool) -> None:
    server, url = await _serve(answer)
    jobs = Workload(ends_by_reason=True).jobs()
    (record,) = await closed_loop(url, {}, jobs, concurrency=1, count=1)
    server.close()
    assert (record.error is None) is is_whole


def test_jobs_that_are_made_ahead_are_the_same_and_none_comes_twice() -> None:
    workload = Workload(prompt_tokens=4)
    expected = [job.body for job in itertools.islice(workload.jobs(), 20)]
    jobs = workload.jobs()
    found = [job.body for job in itertools.islice(workload.ahead(jobs, 8), 10)]
    found += [job.body for job in itertools.islice(workload.ahead(jobs, 2), 10)]
    assert found == expected


async def test_what_does_not_speak_http_is_a_failure() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    (record,) = await closed_loop(url, {}, Workload().jobs(), concurrency=1, count=1)
    server.close()
    assert record.error is not None
    assert "HTTP" in record.error


@pytest.mark.parametrize(
    "arguments",
    [["--concurrency", "0"], ["--concurrency", "x"], ["--token-ids", "9"], ["--token-ids", "9:2"], ["--trace", "none"]],
)
def test_a_wrong_argument_is_refused_with_advice(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


VECTORS = b'{"data":[{"embedding":"AACAPw==","index":0}],"usage": {"prompt_tokens":5,"total_tokens":5},"model":"m"}'


async def test_embeddings_of_any_server_are_measured_for_a_time(tmp_path: Path) -> None:
    """A server with another path, an answer that is no stream, and a run that ends by the clock."""
    server, url = await _serve(VECTORS)
    data = tmp_path / "figures.json"
    work = ["--endpoint", "embeddings", "--path", "/embeddings", "--items", "3", "--encoding-format", "base64"]
    load = ["--concurrency", "2", "--seconds", "0.2", "--warm-up", "0", "--json", str(data)]
    began = time.perf_counter()
    assert await asyncio.to_thread(main, ["--url", url, *work, *load]) == 0
    assert time.perf_counter() - began >= 0.2
    server.close()
    await server.wait_closed()
    (run,) = json.loads(data.read_text())["runs"]
    assert run["items_per_second"] == pytest.approx(3 * run["requests_per_second"])
    assert run["prompt_tokens_per_second"] == pytest.approx(5 * run["requests_per_second"])


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("embeddings", {"input"}),
        ("similarity", {"source", "targets"}),
        ("rerank", {"query", "documents"}),
        ("classify", {"input"}),
        ("sentiment", {"input"}),
    ],
)
def test_each_endpoint_is_sent_its_own_fields(endpoint: str, fields: set[str]) -> None:
    job = next(Workload(endpoint=endpoint, items=4).jobs())
    assert set(json.loads(job.body)) == fields
    assert (job.path, job.num_items) == (f"/v1/{endpoint}", 4)


def test_fields_are_put_over_the_body_or_left_out_of_it() -> None:
    job = next(Workload(fields={"ignore_eos": None, "min_tokens": 64}).jobs())
    body = json.loads(job.body)
    assert "ignore_eos" not in body
    assert (body["min_tokens"], body["max_tokens"]) == (64, 64)
