"""Requests that are wrong: each gets a 4xx that names the field, none a 5xx, and the next good one is answered."""

import json
from typing import Any

import httpx
import pytest

from service.http import envelope

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/v1/tokenize", "/v1/detokenize"
USER = {"role": "user", "content": "x"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HUGE = 10**30

# What both generating endpoints refuse: what `param` must say, and bad values of its first part.
SHARED: list[tuple[str, list[Any]]] = [
    ("model", [5, "", "nope", "../../etc/passwd", "a" * 300, ["tiny"], {}, "tiny@v2", "encoder"]),
    ("max_tokens", [-2, 1.5, "5", True, [], HUGE, 2**31, 5000]),
    ("temperature", [-0.1, 2.1, "hot", True, [0.5], HUGE, 1e400]),
    ("top_p", [-0.1, 1.1, "x", False]),
    ("top_k", [-2, 1.5, "x", HUGE]),
    ("min_p", [-0.5, 1.5, "x"]),
    ("repetition_penalty", [0, 5e-324, -1, 101, "x"]),
    ("presence_penalty", [-2.1, 2.1, "x"]),
    ("frequency_penalty", [-3, 3, {}]),
    ("logit_bias", [[], "x", {"-1": 1}, {"x": 1}, {"99999": 1}, {"²": 1}, {"1" * 5000: 1}]),
    ("logit_bias.5", [{"5": 101}, {"5": -101}, {"5": "x"}, {"5": None}]),
    ("n", [0, -1, 129, 10**9, HUGE, 1.5, "2", True]),
    ("seed", [1.5, "x", 2**63, -(2**63) - 1, HUGE, True]),
    ("stop", [5, "", {}, ["a"] * 17, "a" * 2000]),
    ("stop.1", [["a", ""], ["a", 5], ["a", "b" * 2000]]),
    ("stop_token_ids", ["x", 5, [5, 99999]]),
    ("stop_token_ids.0", [["x"], [-1], [1.5], [HUGE]]),
    ("min_tokens", [-1, "x", 1.5, 5000]),
    ("ignore_eos", ["yes", 1, []]),
    ("skip_special_tokens", ["no", 0]),
    ("stream", ["true", 1, [], "yes"]),
    ("stream_options", [5, [], "x", {"include_usage": True}]),
    ("stream_options.include_usage", [{"include_usage": "x"}]),
    ("stream_options.other", [{"other": 1}]),
    ("response_format", [5, "json", []]),
    ("response_format.type", [{}, {"type": "xml"}, {"type": 5}]),
    ("response_format.json_schema", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": 5}]),
    ("response_format.json_schema.schema", [
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "object"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objec"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "("}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/x"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": 5}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "x" * 200_000}}},
    ]),
    ("response_format.schema", [{"type": "json_object", "schema": schema} for schema in ("x", {"type": 5})]),
    ("response_format.json_schema.name", [{"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}]),
    ("regex", [5, "", "(", "(?=x)", "[", "\\1", "a" * 200_000]),
    ("grammar", [5, "", "start: nothing", "not a grammar", "root ::= foo", "start: /(/", "a" * 200_000]),
    ("priority", ["high", 1.5, 1001, -1001]),
    ("timeout", [0, -1, "5", []]),
    ("truncate_prompt_tokens", [0, -2, "x"]),
    ("use_beam_search", [True, "x"]),
    ("length_penalty", [2, 0.5, "x"]),
    ("spaces_between_special_tokens", [False, "x"]),
    ("prompt_logprobs", [-1, 21, "x", True]),
    ("best_of", [2, 0, "x"]),
    ("guided_json", [5, "", "{", {"type": "objec"}]),
    ("guided_regex", [5, "", "("]),
    ("guided_choice", [[], "x"]),
    ("guided_grammar", [5, "", "start: nothing"]),
    ("json_schema", [5, "{", {"type": "objec"}]),
    ("ebnf", [5, "", "root ::= foo"]),
    ("request_id", [5, "", "a b", "a" * 129]),
    ("rid", [5, "", "a\r\nb", ["a"]]),
    ("cache_salt", [5, "x" * 257]),
    ("user", [5, []]),
    ("no_such_field", [1, "x", {}]),
    ("best_off", [2]),
]  # fmt: skip

COMPLETION_ONLY: list[tuple[str, list[Any]]] = [
    ("prompt", [5, {}, True, [], "", "a" * 5000, [99999], [1, 99999], ["a"] * 1025]),
    ("prompt.0", [[[]], [HUGE], [-1], [None], [{}], [""] * 2]),
    ("prompt.1", [["a", ""], ["a", 5], [[1], []], [[1], "a"], ["a", "a" * 5000], [[1], [99999]], [5, -1]]),
    ("prompt.1.0", [[[1], ["x"]]]),
    ("echo", ["yes", 1]),
    ("logprobs", [-1, 21, "x", True, 1.5]),
    ("suffix", ["x", 5]),
    ("add_special_tokens", ["no"]),
    ("messages", [[USER]]),
]

CHAT_ONLY: list[tuple[str, list[Any]]] = [
    ("messages", [5, "hi", {}, [], [USER] * 5000, [{"role": "user", "content": "a" * 5000}]]),
    ("messages.0", [["hi"], [5], [[]]]),
    ("messages.0.role", [[{"content": "x"}], [{"role": "boss", "content": "x"}], [{"role": 5, "content": "x"}]]),
    ("messages.0.content", [
        [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": []}], [{"role": "user", "content": {}}], [{"role": "assistant"}],
    ]),
    ("messages.0.content.0.type", [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"text": "x"}]}],
    ]),
    ("messages.0.content.0.text", [
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    ]),
    ("messages.0.tool_calls", [[{"role": "user", "content": "x", "tool_calls": [CALL]}]]),
    ("messages.1.tool_call_id", [[USER, {"role": "tool", "content": "x"}]]),
    ("messages.1.tool_calls.0.function.arguments", [
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}],
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[]"}}]}],
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}],
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}],
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[" * 2000}}]}],
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "1" * 5000}}]}],
    ]),
    ("messages.1.tool_calls.0.type", [[USER, {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]]),
    ("max_tokens", [0]),
    ("max_completion_tokens", [0, -2, "x", 5000]),
    ("echo", [True]),
    ("include_reasoning", ["x"]),
    ("logprobs", [5, "yes"]),
    ("top_logprobs", [-1, 21, "x", 5]),
    ("tools", [5, {}, [TOOL] * 200]),
    ("tools.0", [["f"], [5]]),
    ("tools.0.type", [[{"type": "retrieval"}], [{"function": FUNCTION}]]),
    ("tools.0.function", [[{"type": "function"}], [{"type": "function", "function": 5}]]),
    ("tools.0.function.name", [
        [{"type": "function", "function": {"name": name}}] for name in ("", "a b", "x" * 65, 5)
    ]),
    ("tools.0.function.parameters", [[{"type": "function", "function": {"name": "f", "parameters": "object"}}]]),
    ("tools.1.function.name", [[TOOL, TOOL]]),
    ("tool_choice", ["sometimes", 5, "required", {"type": "function", "function": {"name": "f"}}]),
    ("tool_choice.function", [{"type": "function"}]),
    ("parallel_tool_calls", ["no"]),
    ("documents", ["x"]),
    ("documents.0", [[5]]),
    ("chat_template_kwargs", [5, "x"]),
    ("store", [5, "yes"]),
    ("metadata", [5, "x"]),
    ("service_tier", ["flex", 5]),
    ("modalities.0", [["audio"]]),
    ("functions", [[FUNCTION]]),
    ("function_call", ["auto"]),
    ("reasoning_effort", ["high"]),
    ("audio", [{"voice": "x", "format": "wav"}]),
    ("prediction", [{"type": "content", "content": "x"}]),
    ("web_search_options", [{}]),
    ("chat_template", ["{{ 1 }}"]),
    ("prompt", ["x"]),
]  # fmt: skip


def table() -> list[Any]:
    rows = []
    for path, fields in ((COMPLETIONS, [*SHARED, *COMPLETION_ONLY]), (CHAT, [*SHARED, *CHAT_ONLY])):
        for param, values in fields:
            for number, value in enumerate(values):
                rows.append(pytest.param(path, param, value, id=f"{path.split('/')[2]}-{param}-{number}"))
    return rows


def good(path: str) -> dict[str, Any]:
    return {"messages": [USER]} if path == CHAT else {"prompt": "x"}


PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
SOUND = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {}}]}]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": PICTURE},
         "messages.0.content.0.type: this service takes text; a part of type 'image_url' cannot be read"),
        (CHAT, {"messages": SOUND},
         "messages.0.content.1.type: this service takes text; a part of type 'input_audio' cannot be read"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content.0.type: this service takes text; a part of type 'input_image' cannot be read"),
        (CHAT, {"response_format": {"type": "xml"}},
         "response_format.type: 'xml' is none of those there are: 'text', 'json_object', 'json_schema'"),
        (CHAT, {"response_format": {"schema": {}}}, "response_format.type: this field is required"),
        ("/v1/responses", {"text": {"format": {"type": "xml"}}, "input": "x"},
         "text.format.type: 'xml' is none of those there are: 'text', 'json_object', 'json_schema'"),
        (COMPLETIONS, {"prompt": 5},
         "prompt: give a text, a list of texts, a list of token ids, or a list of such lists"),
        ("/v1/embeddings", {"input": 5}, "input: give a text, or a list of texts"),
        ("/embed", {"inputs": {}}, "inputs: give a text, or a list of texts"),
        *[(address, {"query": "x", "documents": ["a"], "texts": ["a"]},
           "texts: the name that text-embeddings-inference has for documents, at /rerank alone: give texts or "
           "documents, not both") for address in ("/v1/rerank", "/v2/rerank", "/rerank", "/")],
    ],
)  # fmt: skip
async def test_what_is_wrong_is_told_in_words_for_the_caller_and_not_for_who_wrote_the_types(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], message: str
) -> None:
    """These were "input should be 'text'", "input tag 'xml' found using 'type' does not match", "valid string"."""
    around = good(path) if path in (CHAT, COMPLETIONS) else {}
    response = await client.post(path, json=around | body)
    error = response.json()["error"]
    assert (response.status_code, error["message"]) == (400, message)
    assert error["param"] == message.split(":")[0]


@pytest.mark.parametrize(("path", "param", "value"), table())
async def test_a_wrong_field_is_named_and_the_next_request_answered(
    client: httpx.AsyncClient, path: str, param: str, value: Any
) -> None:
    body = good(path) | {param.split(".")[0]: value}
    content = json.dumps(body).replace("Infinity", "1e400")
    response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if response.status_code != 413 and error["code"] != "invalid_json":
        assert error["param"] == param, error
    assert len(error["message"]) < 2000
    assert (await client.post(path, json=good(path))).status_code == 200


COMBINATIONS = [
    (COMPLETIONS, {"regex": "a", "grammar": 'start: "a"'}, "grammar"),
    (COMPLETIONS, {"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
    (COMPLETIONS, {"prompt": ["a"] * 600, "n": 2}, "n"),
    (COMPLETIONS, {"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    (COMPLETIONS, {"guided_regex": "a", "regex": "a"}, "guided_regex"),
    (COMPLETIONS, {"ebnf": 'root ::= "a"', "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"include_reasoning": False, "separate_reasoning": False}, "include_reasoning"),
    (CHAT, {"n": 2, "best_of": 3}, "best_of"),
    (CHAT, {"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "tool_choice"),
    (CHAT, {"model": "plain"}, "model"),
    (CHAT, {"model": "encoder"}, "model"),
    *((CHAT, {"model": "coder", "tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}
    ]}, "tools") for schema in (
        {"type": "nope"}, {"type": "integer", "minimum": "x"}, {"type": "string", "pattern": "("},
        {"type": "string", "minLength": "x"}, {"type": "array", "items": {"$ref": "#/nowhere"}},
    )),
    (CHAT, {"continue_final_message": True, "messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
     "messages"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}}],
            "tool_choice": "required"}, "tools"),
    (TOKENIZE, {}, "text"),
    (TOKENIZE, {"text": "x", "messages": [USER]}, "messages"),
    (TOKENIZE, {"text": 5}, "text"),
        (TOKENIZE, {"text": "x", "other": 1}, "other"),
    (TOKENIZE, {"messages": [USER], "model": "plain"}, "model"),
    (TOKENIZE, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (DETOKENIZE, {}, "tokens"),
    (DETOKENIZE, {"tokens": "x"}, "tokens"),
    (DETOKENIZE, {"tokens": [-1]}, "tokens.0"),
    (DETOKENIZE, {"tokens": [1, 99999]}, "tokens"),
    (DETOKENIZE, {"tokens": [1, HUGE]}, "tokens.1"),
    (DETOKENIZE, {"tokens": [1], "model": 5}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), COMBINATIONS)
async def test_what_does_not_fit_together_is_named(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=(good(path) if "completions" in path else {}) | body)
    assert response.status_code == 400, response.text[:300]
    assert response.json()["error"]["param"] == param


NESTED = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
RAW: list[tuple[str, bytes, dict[str, str], int]] = [
    ("no JSON", b"prompt=x", {}, 400),
    ("nothing", b"", {}, 400),
    ("half", b'{"prompt": "x"', {}, 400),
    ("two values", b'{"prompt": "x"} {}', {}, 400),
    ("an array", b"[]", {}, 400),
    ("a string", b'"x"', {}, 400),
    ("null", b"null", {}, 400),
    ("NaN", b'{"prompt": "x", "temperature": NaN}', {}, 400),
    ("infinity", b'{"prompt": "x", "temperature": Infinity}', {}, 400),
    ("minus infinity", b'{"prompt": "x", "top_p": -Infinity}', {}, 400),
    ("a number of ten thousand digits", b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", {}, 400),
    ("invalid UTF-8", b'{"prompt": "\xff\xfe"}', {}, 400),
    ("UTF-16", '{"prompt": "x"}'.encode("utf-16"), {}, 400),
    ("half a surrogate", b'{"prompt": "\\ud800"}', {}, 400),
    ("half a surrogate as a name", b'{"prompt": "x", "\\udfff": 1}', {}, 400),
    ("half a surrogate in a schema", b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": '
     b'{"name": "x", "schema": {"const": "\\ud800"}}}}', {}, 400),
    ("half a surrogate as a model", b'{"prompt": "x", "model": "\\ud800"}', {}, 400),
    ("a NUL byte", b'{"prompt": "\x00"}', {}, 400),
    ("deep nesting", NESTED, {}, 400),
    ("deep objects", b'{"a":' * 5000 + b"1" + b"}" * 5000, {}, 400),
    ("ten megabytes", b'{"prompt": "' + b"a" * 10_000_000 + b'"}', {}, 413),
    ("seven megabytes", b'{"prompt": "' + b"a " * 3_500_000 + b'"}', {}, 400),
    ("a million ids", b'{"prompt": [' + b"1," * 999_999 + b"1]}", {}, 400),
    ("another media type", b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
    ("a form", b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ("a timeout header that is no number", b'{"prompt": "x"}', {"x-request-timeout": "soon"}, 400),
    ("a negative timeout header", b'{"prompt": "x"}', {"x-request-timeout": "-1"}, 400),
    ("an infinite timeout header", b'{"prompt": "x"}', {"x-request-timeout": "inf"}, 400),
    ("compressed and cut off", b"\x1f\x8b", {"content-encoding": "gzip"}, 400),
    ("compressed in an unknown way", b"\x1f\x8b", {"content-encoding": "zstd"}, 415),
]  # fmt: skip


@pytest.mark.parametrize(("content", "headers", "status"), [pytest.param(*row[1:], id=row[0]) for row in RAW])
async def test_a_body_that_is_not_what_it_should_be_is_refused(
    client: httpx.AsyncClient, content: bytes, headers: dict[str, str], status: int
) -> None:
    for path in (COMPLETIONS, CHAT):
        response = await client.post(path, content=content, headers={"content-type": "application/json"} | headers)
        assert 400 <= response.status_code < 500, response.text[:300]
        if path == COMPLETIONS:
            assert response.status_code == status, response.text[:300]
        assert response.json()["error"]["message"]
    assert (await client.post(COMPLETIONS, json=good(COMPLETIONS))).status_code == 200


async def test_the_table_is_as_large_as_promised() -> None:
    assert len(table()) + len(COMBINATIONS) + len(RAW) >= 150


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [1.5] * 20_000}, "prompt.0"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": ["x"] * 20_000}, "stop_token_ids.0"),
        ("/v1/classify", {"input": [{}] * 2000}, "input.0"),
    ],
)
async def test_a_long_list_is_looked_through_up_to_its_first_fault(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    """Millions of wrong elements made gigabytes of faults, and that twice."""
    counts, plain = [], envelope.validation_error

    def counted(faults: Any, body: object) -> Any:
        counts.append(len(faults))
        return plain(faults, body)

    monkeypatch.setattr(envelope, "validation_error", counted)
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert len(counts) == 1
    assert counts[0] <= 8
