"""The command against a small service that answers by rule: what is asked, waited for, reported and compared."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli import main
from service.evaluate.asking import EvaluateError, Fault, Service, ask_all

Rule = Callable[[str, dict[str, Any]], tuple[int, Any]]


class FakeService:
    """`rule` gives status and answer of each request; what was asked is kept."""

    def __init__(self, rule: Rule) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                service.asked.append((self.path, body))
                status, answer = rule(self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Rule], FakeService]]:
    made: list[FakeService] = []

    def start(rule: Rule) -> FakeService:
        made.append(FakeService(rule))
        return made[-1]

    yield start
    for service in made:
        service.close()


def answer(body: dict[str, Any], entry: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"model": body.get("model", "tiny"), "model_version": "1", "data": [{"index": 0, **entry}]}


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "x", "param": None, "code": "x"}}


def sentiment(_: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Right on texts that say so; the model `worse` is wrong on `good film` as well; one text is too long."""
    text = body["input"]
    if text == "too long":
        return error(400, "the text has 900 tokens; the limit is 512")
    label = "positive" if "good" in text else "negative"
    if body.get("model") == "worse" and text == "good film":
        label = "negative"
    return answer(body, {"label": label, "confidence": 0.9})


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


REVIEWS = [
    {"text": "good film", "label": "positive"},
    {"text": "good dog", "label": "positive"},
    {"text": "bad film", "label": "negative"},
    {"text": "not my thing", "label": "positive"},
    {"text": "too long", "label": "negative"},
]


def run(url: str, task: str, data: Path, *more: str) -> tuple[int, dict[str, Any]]:
    report = data.with_suffix(".json")
    line = [
        "evaluate",
        "--url",
        url,
        "--task",
        task,
        "--data",
        str(data),
        "--json",
        str(report),
        "--draws",
        "50",
        *more,
    ]
    code = main(line)
    return code, json.loads(report.read_text()) if report.is_file() else {}


def test_labels_are_scored_and_an_item_that_fails_is_left_out_and_named(
    serve: Any, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "report.png"
    code, report = run(serve(sentiment).url, "sentiment", data(*REVIEWS), "--png", str(picture))
    assert code == 0
    assert (report["num_scored"], report["num_failed"]) == (4, 1)
    assert report["failures"][0]["line"] == 5
    assert "900 tokens" in capsys.readouterr().out
    assert report["metrics"]["accuracy"]["value"] == 0.75
    assert report["metrics"]["ece"]["value"] == pytest.approx(0.15)
    assert report["confusion"] == {"labels": ["negative", "positive"], "matrix": [[1, 0], [1, 2]]}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_second_model_is_compared_on_the_same_items(serve: Any, data: Any, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    _, report = run(serve(sentiment).url, "sentiment", data(*REVIEWS), "--compare", "worse", "--png", str(picture))
    found = report["comparison"]
    assert found["second"]["model"] == "worse"
    assert found["deltas"]["accuracy"]["value"] == -0.25
    flip = {"line": 1, "gold": "positive", "before": "positive", "after": "negative", "gained": -1.0}
    assert found["flips"] == [flip]
    assert found["mcnemar_p"] == 1.0
    assert picture.is_file()


def test_a_second_address_is_asked_too(serve: Any, data: Any) -> None:
    first, second = serve(sentiment), serve(sentiment)
    _, report = run(first.url, "sentiment", data(*REVIEWS), "--compare", second.url)
    assert len(first.asked) == len(second.asked) == 5
    assert report["comparison"]["flips"] == []


def test_classification_by_labels_of_the_data(serve: Any, data: Any) -> None:
    service = serve(lambda _, body: answer(body, {"label": "sports", "confidence": 1.0}))
    rows = [{"text": "ball", "label": "sports"}, {"text": "vote", "label": "politics"}]
    _, report = run(service.url, "classify", data(*rows), "--labels", "data", "--truncate")
    assert report["metrics"]["accuracy"]["value"] == 0.5
    path, body = service.asked[0]
    assert path == "/v1/classify"
    assert (body["labels"], body["truncate"]) == (["politics", "sports"], True)


def test_every_other_task_is_asked_and_scored(serve: Any, data: Any) -> None:
    def rule(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        match path:
            case "/v1/similarity":
                return answer(body, {"score": len(body["pairs"][0][1]) / 10})
            case "/v1/summarize":
                return answer(body, {"summary": body["input"][:7]})
            case "/v1/translate":
                return answer(body, {"translation": {"hallo": "hello there my friend"}[body["input"]]})
            case "/v1/answer":
                return answer(body, {"answer": "The mat." if body["question"] == "where?" else None})
            case _:
                logprobs = {"token_logprobs": [None, -math.log(2), -math.log(8)]}
                return 200, {"model": "tiny", "choices": [{"text": "", "logprobs": logprobs}]}

    url = serve(rule).url
    pairs = [{"text_a": "a", "text_b": "b" * size, "score": size} for size in (1, 3, 2)]
    assert run(url, "embeddings", data(*pairs))[1]["metrics"]["spearman"]["value"] == pytest.approx(1)
    documents = [{"document": "the cat sat", "summary": "the cat"}, {"document": "a b c", "summaries": ["x", "a b c"]}]
    assert run(url, "summarize", data(*documents))[1]["metrics"]["rougeL"]["value"] == 1
    texts = [{"source": "hallo", "target": "hello there my friend"}]
    _, report = run(url, "translate", data(*texts), "--source", "de", "--target", "en")
    assert report["metrics"]["bleu"]["value"] == pytest.approx(100)
    questions = [
        {"question": "where?", "context": "on the mat", "answers": {"text": ["mat"], "answer_start": [7]}},
        {"question": "who?", "context": "on the mat", "answers": []},
    ]
    assert run(url, "answer", data(*questions))[1]["metrics"]["exact_match"]["value"] == 1
    metrics = run(url, "generate", data({"text": "abcd"}))[1]["metrics"]
    assert metrics["perplexity"]["value"] == pytest.approx(4)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], 'line 1: the field "label"'),
        ([{"text": "a", "label": "x"}, "{"], "line 2"),
        ([[1]], "line 1: not an object"),
        ([], "no items"),
    ],
)
def test_wrong_data_is_named_by_its_line(
    rows: list[Any], message: str, data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("http://127.0.0.1:9", "sentiment", data(*rows))[0] == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda path, body: error(404, "model 'x' is not loaded"), "404: model 'x' is not loaded"),
        (lambda path, body: error(500, "the step failed"), "answered none of 2 items; line 1: 500: the step failed"),
        (lambda path, body: (200, {"something": "else"}), "unknown shape"),
    ],
)
def test_a_service_that_cannot_be_scored_is_an_error(
    rule: Rule, message: str, serve: Any, data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(serve(rule).url, "sentiment", data(*REVIEWS[:2]))[0] == 1
    assert message in capsys.readouterr().err


def test_nobody_at_the_address_is_an_error(serve: Any, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    service = serve(sentiment)
    service.server.server_close()
    assert run(service.url, "sentiment", data(*REVIEWS))[0] == 1
    assert "does not answer" in capsys.readouterr().err


async def test_a_service_that_is_full_is_waited_for() -> None:
    """As long as it says; another fault is the item's own, and all answers stay in their order."""
    refusals = {"a": 2, "b": 0, "c": 1}
    slept: list[float] = []

    def handle(request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["input"]
        if refusals[text]:
            refusals[text] -= 1
            return httpx.Response(429, headers={"retry-after": "3"}, json={"error": {"message": "full"}})
        return httpx.Response(400 if text == "b" else 200, json={"error": {"message": text}})

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    bodies = [{"input": text} for text in "abc"]
    found = await ask_all(
        Service(url="http://test"), "/v1/x", bodies, transport=httpx.MockTransport(handle), sleep=sleep
    )
    assert found == [{"error": {"message": "a"}}, Fault(400, "b"), {"error": {"message": "c"}}]
    assert slept == [3, 3, 3]


async def test_patience_ends() -> None:
    async def sleep(seconds: float) -> None: ...

    transport = httpx.MockTransport(lambda request: httpx.Response(503, headers={"retry-after": "4"}, json={}))
    service = Service(url="http://test", patience_seconds=10)
    with pytest.raises(EvaluateError, match="no room for 8 s"):
        await ask_all(service, "/v1/x", [{}], transport=transport, sleep=sleep)


async def test_no_more_requests_at_a_time_than_said() -> None:
    running = most = 0

    class Counting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(5):
                await asyncio.sleep(0)
            running -= 1
            return httpx.Response(200, json={})

    await ask_all(Service(url="http://test", concurrency=3), "/v1/x", [{}] * 20, transport=Counting())
    assert most == 3
