"""Bodies: size, time, type, encoding and JSON are refused at the door with 4xx, and the next good request works."""

import asyncio
import contextlib
import gzip
import threading
import time
import tracemalloc

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from service.api.state import RECORD_KEY
from service.http import body as body_module
from service.http.body import BodyLimits, BodyReader
from service.http.strict_json import InvalidJson, check_json
from service.logs import RequestRecord

JSON = {"content-type": "application/json"}
GZIP = JSON | {"content-encoding": "gzip"}


def gzipped(content: bytes) -> bytes:
    """Without the time, by which names of tests differed between the processes that run them."""
    return gzip.compress(content, mtime=0)


# JSON


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": [1, 2.5, -3e8, true, false, null, "\\u00e9\\ud83d\\ude00"]}',
        b'{"a": {"a": {"a": 1}}}',
        '["ü\U0001f600"]'.encode(),
        b" 1 ",
        b'"text \\\\ud800 is escaped"',
    ],
)
def test_sound_json_passes(body):
    check_json(body, max_depth=8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "line 1 column 2"),
        (b"", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[Infinity]", "Infinity is not"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[1e999]", "too large"),
        (b"[-1e400]", "too large"),
        (b"[" + b"1" * 5000 + b"]", "5000 digits"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'[{"x": {"b": 1, "b": 1}}]', "'b' is given twice"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(5000)) + b"}", "5,000 names; the limit is 4,096"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'"\xff"', "not UTF-8: byte 1 is 0xff"),
        ('{"a": 1}'.encode("utf-16"), "not"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON: it begins with a byte order mark"),
        (b"[" * 9 + b"]" * 9, "more than 8 levels"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "more than 8 levels"),
        (b"[" * 100_000, ""),
        (b"[" * 100_000 + b"]" * 100_000, "more than 8 levels"),
        (b'"a\nb"', "Invalid control character"),
    ],
)
def test_unsound_json_is_refused_with_the_reason(body, message):
    with pytest.raises(InvalidJson) as caught:
        check_json(body, max_depth=8)
    assert message in caught.value.message
    assert caught.value.status == 400


@given(st.integers(1, 30), st.integers(1, 30))
def test_depth_is_refused_exactly_beyond_the_limit(depth, limit):
    body = b"[" * depth + b"]" * depth
    if depth <= limit:
        check_json(body, limit)
    else:
        with pytest.raises(InvalidJson):
            check_json(body, limit)


def test_a_repeated_name_among_very_many_is_found_at_once():
    """Each name used to be counted among all of them: hours for a body of the largest size."""
    names = [*map(str, range(300_000)), "299999"]
    body = ("{" + ",".join(f'"{name}":0' for name in names) + "}").encode()
    began = time.monotonic()
    with pytest.raises(InvalidJson, match="'299999' is given twice"):
        check_json(body, max_depth=8)
    assert time.monotonic() - began < 20


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused_but_never_fail(body):
    with contextlib.suppress(InvalidJson):
        check_json(body, max_depth=16)


# Over HTTP


@pytest.fixture
async def client(make_client, make_app):
    app: FastAPI = make_app(max_body_bytes=1000, max_json_depth=8)

    @app.post("/v1/count")
    async def count(request: Request) -> dict[str, int]:
        return {"num_bytes": len(await request.body())}

    return await make_client(app)


async def test_a_large_body_is_read_beside_the_event_loop(make_client, make_app, monkeypatch):
    readers = []

    def check(body, max_depth):
        readers.append(threading.current_thread() is threading.main_thread())
        return check_json(body, max_depth)

    monkeypatch.setattr(body_module, "check_json", check)
    client = await make_client(make_app())
    for num_objects in (10, 50_000):
        response = await client.post("/v1/completions", content=b"[" + b"{}," * num_objects + b"1]", headers=JSON)
        assert response.status_code == 400
    assert readers == [True, False]


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'"' + b"x" * 999 + b'"', JSON, 413, "payload_too_large"),
        (b'{"a": NaN}', JSON, 400, "invalid_json"),
        (b"[" * 9 + b"]" * 9, JSON, 400, "invalid_json"),
        (b"a=1", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b"{}", {"content-type": "text/json"}, 415, "unsupported_media_type"),
        (b"{}", {"content-type": "application/json; charset=latin-1"}, 415, "unsupported_media_type"),
        (b"{}", {**JSON, "content-encoding": "br"}, 415, "unsupported_media_type"),
        (gzipped(b"{}"), {**JSON, "content-encoding": "gzip, gzip"}, 415, "unsupported_media_type"),
        (b"{}", GZIP, 400, "invalid_encoding"),
        (gzipped(b"{}")[:-1], GZIP, 400, "invalid_encoding"),
        (gzipped(b"{}") * 2, GZIP, 400, "invalid_encoding"),
        (gzipped(b"{}") + b"x", GZIP, 400, "invalid_encoding"),
        (gzipped(b"{"), GZIP, 400, "invalid_json"),
        (gzipped(b"{}"), {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        (gzipped(b'"' + b"x" * 999 + b'"'), GZIP, 413, "payload_too_large"),
        (gzipped(b"0" * 100_000_000), {**GZIP, "content-length": "900"}, 413, "payload_too_large"),
        (b"{}", {**JSON, "content-length": "-2"}, 400, "invalid_request"),
    ],
)
async def test_unfit_body_is_refused_and_the_next_good_one_works(client, content, headers, status, code):
    response = await client.post("/v1/count", content=content, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    good = await client.post("/v1/count", content=b'{"a": 1}', headers=JSON)
    assert good.json() == {"num_bytes": 8}


@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON; charset=UTF-8", "application/vnd.api+json"]
)
async def test_json_media_types_are_taken(client, media_type):
    response = await client.post("/v1/count", content=b"{}", headers={"content-type": media_type})
    assert response.status_code == 200


async def test_chunked_body_is_counted_while_it_comes(client):
    async def chunks():
        for _ in range(100):
            yield b"x" * 100

    response = await client.post("/v1/count", content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


async def test_body_of_exactly_the_limit_passes(client):
    response = await client.post("/v1/count", content=b'"' + b"x" * 998 + b'"', headers=JSON)
    assert response.json() == {"num_bytes": 1000}


@pytest.mark.parametrize("encoding", ["gzip", "GZip", "x-gzip"])
async def test_compressed_body_of_exactly_the_limit_passes(client, encoding):
    content = gzip.compress(b'"' + b"x" * 998 + b'"')
    response = await client.post("/v1/count", content=content, headers=JSON | {"content-encoding": encoding})
    assert response.json() == {"num_bytes": 1000}


async def test_compressed_body_may_come_byte_by_byte(client):
    async def chunks():
        for byte in gzip.compress(b'{"a": 1}'):
            yield bytes([byte])

    assert (await client.post("/v1/count", content=chunks(), headers=GZIP)).json() == {"num_bytes": 8}


async def test_long_url_is_refused(client):
    response = await client.get("/v1/models/" + "x" * 9000)
    assert response.status_code == 414
    assert (await client.get("/v1/models?" + "x" * 9000)).status_code == 414


# The layer alone, driven message by message


@pytest.fixture
def drive():
    """Runs the reader on body messages; a message that is None never comes. Returns status (None: no answer)."""

    async def run(reader, messages, headers=((b"content-length", b"10"), (b"content-type", b"application/json"))):
        waiting = iter(messages)
        sent = []

        async def receive():
            message = next(waiting)
            if message is None:
                await asyncio.Event().wait()
            return message

        async def send(message):
            sent.append(message)

        record = RequestRecord("r", "POST", "/x", 0.0)
        scope = {"type": "http", "method": "POST", "path": "/x", "raw_path": b"/x", "query_string": b""}
        await reader({**scope, "headers": list(headers), "state": {RECORD_KEY: record}}, receive, send)
        return (sent[0]["status"] if sent else None), record

    return run


@pytest.fixture
def make_reader():
    """A reader before an application that says 200 and remembers the messages it was given."""

    def make(*, max_bytes=100, timeout_seconds=60.0):
        seen = []

        async def app(scope, receive, send):
            seen.append(await receive())
            seen.append(await receive())
            await send({"type": "http.response.start", "status": 200, "headers": []})

        limits = BodyLimits(max_bytes=max_bytes, max_json_depth=8, timeout_seconds=timeout_seconds)
        return BodyReader(app, limits), seen

    return make


def part(body, more):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


async def test_application_gets_the_body_whole_and_then_learns_that_the_client_left(make_reader, drive):
    reader, seen = make_reader()
    status, _ = await drive(reader, [part(b'{"a"', True), part(b": 1}", False), GONE])
    assert status == 200
    assert seen == [part(b'{"a": 1}', False), GONE]


async def test_body_that_does_not_come_in_time_gets_408(make_reader, drive):
    reader, seen = make_reader(timeout_seconds=0.01)
    status, record = await drive(reader, [part(b"{", True), None])
    assert (status, record.error, seen) == (408, "request_timeout", [])


async def test_client_that_leaves_while_sending_gets_no_answer(make_reader, drive):
    reader, seen = make_reader()
    status, record = await drive(reader, [part(b"{", True), GONE])
    assert (status, record.error, seen) == (None, "client_gone", [])


async def test_many_large_bodies_at_once_are_bounded_and_given_back(make_reader, drive, monkeypatch):
    monkeypatch.setattr(body_module, "HELD_BODIES", 2)
    reader, _ = make_reader(max_bytes=100)
    big = b'"' + b"x" * 98 + b'"'
    stuck = [asyncio.create_task(drive(reader, [part(big, True), None])) for _ in range(2)]
    await asyncio.sleep(0)
    status, record = await drive(reader, [part(big, False), GONE])
    assert (status, record.error) == (503, "unavailable")
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    status, _ = await drive(reader, [part(big, False), GONE])
    assert status == 200


async def test_a_bomb_is_refused_before_it_takes_room(make_reader, drive):
    """100 MB of noughts in 100 KB: no more of them are ever made than the limit allows, and none is held after."""
    reader, seen = make_reader(max_bytes=10_000)
    bomb = gzip.compress(b"0" * 100_000_000)
    headers = [(name.encode(), value.encode()) for name, value in GZIP.items()]
    tracemalloc.start()
    status, record = await drive(reader, [part(bomb[:9000], True), None], [*headers, (b"content-length", b"9999")])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (status, record.error, seen) == (413, "payload_too_large", [])
    assert most < 1_000_000
    assert reader._held_bytes == 0


async def test_body_of_no_bytes_is_given_to_the_application_though_nothing_more_comes(make_reader, drive):
    """A chunked body of length nought was read and not passed on, so that the application waited for it for ever."""
    reader, seen = make_reader()
    headers = ((b"transfer-encoding", b"chunked"), (b"content-type", b"application/json"))
    status, _ = await drive(reader, [part(b"", False), GONE], headers)
    assert status == 200
    assert seen == [part(b"", False), GONE]
