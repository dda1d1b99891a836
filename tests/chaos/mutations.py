"""Requests gone wrong: sound ones for every endpoint, and what is done to their JSON and to their bytes on the wire.

Deterministic in the random generator that it is given. Not a test, and knows no network.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 4
_SENTENCE = "The little dog ran home. It was late, and the rain had begun."
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}
SOUND: tuple[tuple[str, str, dict[str, Any] | list[Any] | None], ...] = (
    ("POST", "/v1/completions", {"prompt": "Once", "max_tokens": MAX_TOKENS, "temperature": 0.5, "seed": 3, "n": 1}),
    ("POST", "/v1/completions", {"prompt": ["Once", "Tim"], "max_tokens": MAX_TOKENS, "logprobs": 2, "echo": True}),
    ("POST", "/v1/completions", {"prompt": [5, 9, 20], "max_tokens": MAX_TOKENS, "stop": ["."], "stream": True}),
    (
        "POST",
        "/v1/completions",
        {
            "prompt": "Say",
            "max_tokens": MAX_TOKENS,
            "logit_bias": {"5": 1.5},
            "response_format": {"type": "json_object"},
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": MAX_TOKENS, "tools": [_TOOL], "top_p": 0.9},
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
            "max_tokens": MAX_TOKENS,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    ("POST", "/v1/responses", {"input": "Hi", "max_output_tokens": 16, "instructions": "Be kind."}),
    (
        "POST",
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_tokens": MAX_TOKENS,
            "system": "Be kind.",
            "stop_sequences": ["."],
            "stream": True,
        },
    ),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("POST", "/v1/tokenize", {"text": _SENTENCE}),
    ("POST", "/v1/detokenize", {"tokens": [5, 9, 20]}),
    ("POST", "/v1/embeddings", {"input": [_SENTENCE, "dog"], "encoding_format": "base64", "dimensions": 64}),
    ("POST", "/v1/similarity", {"source": "a dog", "targets": ["a puppy", "rain"]}),
    ("POST", "/v1/rerank", {"query": "dog", "documents": [_SENTENCE, "cats sleep"], "top_n": 1}),
    ("POST", "/v2/rerank", {"query": "dog", "documents": [_SENTENCE, {"text": "cats sleep"}], "max_tokens_per_doc": 4}),
    ("POST", "/v1/score", {"queries": "dog", "documents": [_SENTENCE, "cats sleep"], "truncate_prompt_tokens": 8}),
    ("POST", "/", {"inputs": ["dog", "cat"]}),
    ("POST", "/embed", {"inputs": ["dog", "cat"], "normalize": True, "truncate": False}),
    ("POST", "/embed_all", {"inputs": "dog"}),
    ("POST", "/embed_sparse", {"inputs": ["dog", "cat"], "truncation_direction": "Left"}),
    ("POST", "/v1/sparse_embeddings", {"input": ["dog", "cat"], "truncate": True}),
    ("POST", "/predict", {"inputs": "a fine film", "raw_scores": False}),
    ("POST", "/rerank", {"query": "dog", "texts": ["puppy", "rain"], "return_text": True}),
    ("POST", "/similarity", {"inputs": {"source_sentence": "dog", "sentences": ["puppy", "rain"]}}),
    ("POST", "/tokenize", {"inputs": "dog", "add_special_tokens": True}),
    ("POST", "/decode", {"ids": [5, 9, 20], "skip_special_tokens": True}),
    ("POST", "/hf/text-classification", {"inputs": "a fine film", "parameters": {"top_k": 2}}),
    ("POST", "/hf/zero-shot-classification", {"inputs": "rain", "parameters": {"candidate_labels": ["a", "b"]}}),
    ("POST", "/hf/feature-extraction", {"inputs": "dog"}),
    ("POST", "/hf/sentence-similarity", {"inputs": {"source_sentence": "dog", "sentences": ["puppy"]}}),
    ("POST", "/hf/summarization", {"inputs": _SENTENCE}),
    ("POST", "/hf/question-answering", {"inputs": {"question": "Who ran?", "context": _SENTENCE}}),
    ("POST", "/v1/classify", {"input": "rain", "labels": ["weather", "sport"], "multi_label": False, "top_k": 1}),
    ("POST", "/v1/sentiment", {"input": ["a fine film", "a bad one"], "abstain_below": 0.5}),
    ("POST", "/v1/summarize", {"input": _SENTENCE, "method": "extractive", "max_sentences": 1}),
    ("POST", "/v1/translate", {"input": "dog", "source": "en", "target": "de"}),
    ("POST", "/v1/answer", {"question": "Who ran?", "context": _SENTENCE}),
    ("POST", "/admin/models/lm", {"source": "nowhere"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/lm", None),
    ("GET", "/metrics", None),
    ("GET", "/info", None),
    ("GET", "/openapi.json", None),
    ("DELETE", "/admin/models/lm", None),
)
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 65_536, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**39, 1e308, -1e308, 1e-320,
    0.1, -0.0, 1.0,
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\U0001f9ea" * 50, "e\u0301" * 40, "\u202eabc\u202c", "\ufeff",
    "\ufffe\uffff", "\u2028\u2029", "<|endoftext|>", "</s><s>[INST]", "{{ 7*7 }}{% for x in y %}", "../../etc/passwd",
    "lm@", "@", "lm@nothing", "%00", "'; drop table", "((((((((((((((((((((a+)+)+)+)+)+", "\\u0000", "NaN",
    "\u0130\u0131", "\r\n\r\nGET /", "ffffffff" * 300, "\u4e2d\u6587" * 200, "a" * 20_000,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wrong:
    """A request as it goes out. `is_framed`: the server can tell where it ends, and owes an answer."""

    data: bytes
    is_framed: bool
    may_expire: bool = False
    """It may have asked for a deadline, and so a 504 may be right."""


def make_wrong(chance: random.Random) -> Wrong:
    method, path, body = chance.choice(SOUND)
    if body is not None and chance.random() < 0.65:
        return _with_wrong_json(chance, method, path, body)
    return _with_wrong_bytes(chance, method, path, body)


# -- JSON -------------------------------------------------------------------------------------------------------------


def _with_wrong_json(chance: random.Random, method: str, path: str, body: Any) -> Wrong:
    changed = json.loads(json.dumps(body))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        changed = _change_somewhere(chance, changed)
    text = json.dumps(changed, ensure_ascii=chance.random() < 0.5)
    data = _encoded(chance, text)
    if chance.random() < 0.1:
        data = _change_bytes(chance, data)
    return Wrong(_request(method, path, data), True, b"timeout" in data)


def _encoded(chance: random.Random, text: str) -> bytes:
    if chance.random() < 0.03:
        return text.encode(chance.choice(("utf-16", "utf-32", "utf-8-sig")), "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def _change_somewhere(chance: random.Random, value: Any) -> Any:
    """Goes down a random path and changes what is at its end."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        return _change_member(chance, value, key)
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], _change_somewhere(chance, value[place]), *value[place + 1 :]]
    return _other_value(chance, value)


def _change_member(chance: random.Random, value: dict[str, Any], key: str) -> dict[str, Any]:
    match chance.randrange(10):
        case 0:
            return {name: entry for name, entry in value.items() if name != key}
        case 1:
            return {**value, chance.choice(TEXTS)[:100]: value[key]}
        case 2:
            extra = chance.choice(("timeout", "priority", "best_of", "user", "guided_regex", "stop", "model", "n"))
            return {**value, extra: _other_value(chance, value[key])}
        case _:
            return {**value, key: _change_somewhere(chance, value[key])}


def _other_value(chance: random.Random, value: Any) -> Any:
    match chance.randrange(8):
        case 0 | 1:
            return chance.choice(NUMBERS)
        case 2 | 3:
            return chance.choice(TEXTS)
        case 4:
            return chance.choice((None, True, False, [], {}, [[]], {"": {}}, [None]))
        case 5:
            return [value] * chance.choice((2, 5, 40))
        case 6:
            return _nested(value, chance.choice((5, 60, 70, 400)), chance)
        case _:
            return {"type": value, "content": [value]}


def _nested(value: Any, depth: int, chance: random.Random) -> Any:
    for _ in range(depth):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


# -- bytes ------------------------------------------------------------------------------------------------------------


def _request(method: str, path: str, data: bytes | None, *lines: bytes) -> bytes:
    head = [f"{method} {path} HTTP/1.1".encode(), b"host: chaos", *lines]
    if data is not None:
        head += [b"content-type: application/json", b"content-length: " + str(len(data)).encode()]
    return b"\r\n".join(head) + b"\r\n\r\n" + (data or b"")


def _with_wrong_bytes(chance: random.Random, method: str, path: str, body: Any) -> Wrong:
    data = None if body is None else json.dumps(body).encode()
    wreck = chance.choice(_WRECKS)
    return Wrong(wreck(chance, method, path, data), False)


def _wrong_line(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    method = chance.choice(
        (method, "get", "BREW", "CONNECT", "OPTIONS", "TRACE", "PRI", "", "P\x00ST", "HEAD", "PATCH")
    )
    path = chance.choice(
        (path, "*", "//", "/..", path + "?" + "a=b&" * 3000, path + "%zz", path + "%00", path + "/" * 40, "",
         "http://x" + path, "/v1/models/" + "%F0%9F%A7%AA" * 9, "/v1/models/..%2f..%2fetc", path + "?\xff",
         "/admin/models/%00/rollback")
    )  # fmt: skip
    version = chance.choice(("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "http/1.1", "", "HTTP/1.1 x"))
    rest = _request("GET", "/", data).partition(b"\r\n")[2]
    return f"{method} {path} {version}".encode("latin-1", "replace") + b"\r\n" + rest


def _wrong_header(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    lines = (
        b"content-length: -1", b"content-length: 99999999999999999999", b"content-length: 0x10", b"content-length: 4",
        b"content-length: 5, 5", b"content-length:", b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked",
        b"transfer-encoding: \x0bchunked", b"expect: 100-continue", b"expect: nonsense", b"content-encoding: gzip",
        b"upgrade: h2c\r\nconnection: upgrade", b"content-type: text/plain", b"content-type: \xff\xfe",
        b"content-type: application/json; charset=utf-16", b"x-request-timeout: nan", b"x-request-timeout: -1",
        b"x-request-timeout: 1e400", b"authorization: Bearer \xff\x00", b"authorization: Basic eA==", b"host:",
        b"host: a\r\nhost: b", b"no colon here", b" folded: yes\r\n and on", b"x-request-id: \r\n", b"origin: null",
        b"x-request-id: " + b"a" * 300, b"traceparent: 00-zz-zz-zz", b"cookie: " + b"a" * 40_000, b"x: \x00",
        b"a: b\r\n" * 900 + b"c: d", b"connection: close, keep-alive, \xfe", b"accept: \xf0\x9f", b"range: bytes=5-1",
        b"if-none-match: *", b"priority: 99999999999999999999",
    )  # fmt: skip
    chosen = chance.sample(lines, chance.choice((1, 1, 2)))
    head, _, rest = _request(method, path, data).partition(b"\r\n")
    return head + b"\r\n" + b"\r\n".join(chosen) + b"\r\n" + rest


def _wrong_chunks(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    sizes = (
        b"%x" % len(data or b""),
        b"-1",
        b"fffffffffffffffff",
        b"zz",
        b"",
        b"3;ext=" + b"a" * 50,
        b"0",
        b"0x5",
        b" 4",
    )
    head = f"{method} {path} HTTP/1.1".encode() + b"\r\nhost: x\r\ntransfer-encoding: chunked"
    body = (
        chance.choice(sizes)
        + b"\r\n"
        + (data or b"")
        + b"\r\n0\r\n"
        + chance.choice((b"", b"t: r\r\n", b"bad"))
        + b"\r\n"
    )
    return head + b"\r\ncontent-type: application/json\r\n\r\n" + body


def _cut_off(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    whole = _request(method, path, data)
    return whole[: chance.randrange(1, len(whole))]


def _pipelined(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    one = _request(method, path, data)
    return one * chance.choice((2, 5, 30)) + _cut_off(chance, method, path, data)


def _flipped(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    return _change_bytes(chance, _request(method, path, data))


def _noise(chance: random.Random, method: str, path: str, data: bytes | None) -> bytes:
    return chance.choice(
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"")
    ) + chance.randbytes(chance.choice((1, 100, 5000)))


_WRECKS: tuple[Callable[[random.Random, str, str, bytes | None], bytes], ...] = (
    _wrong_line, _wrong_header, _wrong_header, _wrong_chunks, _cut_off, _pipelined, _flipped, _flipped, _noise,
)  # fmt: skip


def _change_bytes(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0:
                changed[place:place] = chance.randbytes(chance.choice((1, 4)))
            case 1:
                del changed[place : place + chance.choice((1, 8))]
            case 2:
                changed[place : place + 1] = bytes(
                    [chance.choice((0, 9, 10, 13, 34, 92, 123, 125, 255, chance.randrange(256)))]
                )
            case _:
                other = chance.randrange(len(changed) + 1)
                changed[place:place] = changed[min(place, other) : min(max(place, other), min(place, other) + 64)]
    return bytes(changed)
