"""What other servers' users expect beyond OpenAI: token ids, stop strings kept, constraints by choice, thinking."""

import json
import threading
from typing import Any

import httpx
import pytest

from model.batch import SamplingParams
from service.tasks.generation import Delta, Prompt
from service.tasks.replies import ReplyReader

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
THOUGHT = "<think>\nA greeting.\n</think>\n\nHello, wörld 🦙!"


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    start = {"prompt": "Say"} if path == COMPLETIONS else {"messages": HELLO}
    response = await client.post(path, json={**start, "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def stream(client: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    start = {"prompt": "Say"} if path == COMPLETIONS else {"messages": HELLO}
    response = await client.post(path, json={**start, "max_tokens": 100, "stream": True, **body})
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stop", [None, ["wör"], ["🦙"]])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_ids_behind_the_text_come_whole_and_streamed(
    client: httpx.AsyncClient, engine: Any, path: str, stop: Any
) -> None:
    whole = await post(client, path, return_token_ids=True, stop=stop)
    choice = whole["choices"][0]
    prompt_ids = engine.requests[0].prompt_ids
    assert (choice if path == COMPLETIONS else whole)["prompt_token_ids"] == prompt_ids
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    text = engine.models["tiny"].tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
    assert text == "Hello, wörld 🦙!"[: {None: 99, "wör": 10, "🦙": 14}[stop[0] if stop else None]]
    chunks = await stream(client, path, return_token_ids=True, stop=stop)
    streamed = [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", [])]
    assert streamed == choice["token_ids"]
    first = chunks[0]["choices"][0] if path == COMPLETIONS else chunks[0]
    assert first["prompt_token_ids"] == prompt_ids
    assert not any("prompt_token_ids" in str(chunk) for chunk in chunks[1:])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_ids_come_only_where_they_are_asked_for(client: httpx.AsyncClient, path: str) -> None:
    assert "token_ids" not in json.dumps(await post(client, path))
    assert "token_ids" not in json.dumps(await stream(client, path))


async def test_each_choice_has_its_own_ids_and_its_own_prompt_s(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = lambda request: "x" * len(request.prompt_ids)
    answer = await post(client, COMPLETIONS, prompt=["a", "bb"], n=2, return_token_ids=True)
    sizes = {
        choice["index"]: (len(choice["prompt_token_ids"]), len(choice["token_ids"])) for choice in answer["choices"]
    }
    assert sizes == {0: (1, 2), 1: (1, 2), 2: (2, 3), 3: (2, 3)}


@pytest.mark.parametrize(("kept", "text"), [(False, "Hello, "), (True, "Hello, wör")])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_stop_string_is_part_of_the_text_on_request(
    client: httpx.AsyncClient, path: str, kept: bool, text: str
) -> None:
    answer = await post(client, path, stop=["wör"], include_stop_str_in_output=kept)
    chunks = await stream(client, path, stop=["wör"], include_stop_str_in_output=kept)
    if path == COMPLETIONS:
        found, pieces = answer["choices"][0]["text"], [chunk["choices"][0]["text"] for chunk in chunks]
    else:
        found = answer["choices"][0]["message"]["content"]
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert found == "".join(pieces) == text
    assert answer["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_numbers_so_far_come_with_every_chunk_on_request(client: httpx.AsyncClient, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, path, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] <= 1
    assert chunks[-1]["choices"] == []
    assert counts[-1] == 20


@pytest.mark.parametrize(
    ("constraint", "kind", "text"),
    [
        ({"json": {"type": "integer"}}, "json_schema", '{"type": "integer"}'),
        ({"json": '{"type": "integer"}'}, "json_schema", '{"type": "integer"}'),
        ({"regex": "[ab]+"}, "regex", "[ab]+"),
        ({"choice": ["yes", 'a "no"', "ü"]}, "lark", 'start: "yes" | "a \\"no\\"" | "ü"'),
        ({"grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"json_object": True}, "json_object", ""),
    ],
)
async def test_vllm_s_structured_outputs_reach_the_engine(
    client: httpx.AsyncClient, engine: Any, constraint: dict[str, Any], kind: str, text: str
) -> None:
    await post(client, CHAT, structured_outputs=constraint)
    grammar = engine.requests[0].sampling.grammar
    assert (grammar.kind, grammar.text) == (kind, text)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {"regex": "a"}, "regex": "b"}, "structured_outputs"),
    ],
)
async def test_faulty_structured_outputs_are_named(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_allowed_ids_and_bad_words_reach_the_engine(client: httpx.AsyncClient, engine: Any, path: str) -> None:
    await post(client, path, allowed_token_ids=[7, 8], bad_words=["no", " x"])
    sampling, encode = engine.requests[0].sampling, engine.models["tiny"].tokenizer.encode
    assert sampling.allowed_ids == (7, 8)
    assert set(sampling.banned_sequences) == {tuple(encode(text)) for text in ("no", " no", " x")}


@pytest.mark.parametrize(("num_chars", "inline"), [(100, True), (4000, False)])
async def test_bad_words_are_tokenized_once_for_all_prompts_and_beside_the_event_loop_where_they_are_many(
    client: httpx.AsyncClient, engine: Any, monkeypatch: pytest.MonkeyPatch, num_chars: int, inline: bool
) -> None:
    """A thousand prompts took minutes of the event loop."""
    tokenizer, words = engine.models["tiny"].tokenizer, ["x" * (num_chars // 4)] * 4
    encode, calls = type(tokenizer).encode, []

    def counted(self: Any, text: str, **options: Any) -> list[int]:
        if text.strip() == words[0]:
            calls.append(threading.current_thread() is threading.main_thread())
        ids: list[int] = encode(self, text, **options)
        return ids

    monkeypatch.setattr(type(tokenizer), "encode", counted)
    await post(client, COMPLETIONS, prompt=["a", "b", "c"], bad_words=words)
    assert calls == [inline] * 8
    assert len({request.sampling.banned_sequences for request in engine.requests}) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [264]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids.0"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"bad_words": "no"}, "bad_words"),
    ],
)
async def test_faulty_bounds_of_the_vocabulary_are_named(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_what_a_model_thinks_is_told_apart_from_what_it_says(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = THOUGHT
    message = (await post(client, CHAT, model="thinker"))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("A greeting.", "Hello, wörld 🦙!")
    deltas = [chunk["choices"][0]["delta"] for chunk in await stream(client, CHAT, model="thinker")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "A greeting."
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, wörld 🦙!"
    assert not any(delta.get("content") and "reasoning_content" in delta for delta in deltas)


async def test_thinking_stays_in_the_text_on_request_and_where_the_template_knows_none(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = THOUGHT
    for body in ({"model": "thinker", "separate_reasoning": False}, {"model": "tiny"}):
        message = (await post(client, CHAT, **body))["choices"][0]["message"]
        assert message["content"] == THOUGHT
        assert "reasoning_content" not in message


async def test_a_reply_that_breaks_off_while_thinking_has_no_content(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = THOUGHT
    choice = (await post(client, CHAT, model="thinker", max_tokens=12))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("A gr", None)


async def test_a_marker_in_the_midst_of_a_constrained_reply_begins_no_thought(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = '"<think>"'
    message = (await post(client, CHAT, model="thinker", regex=".*"))["choices"][0]["message"]
    assert message["content"] == '"<think>"'


async def test_tools_are_called_after_thinking(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = '<think>x</think><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "now"}}]
    choice = (await post(client, CHAT, model="thinker", tools=tools))["choices"][0]
    assert choice["message"]["reasoning_content"] == "x"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "now"
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True), ("high", True), (None, True)])
async def test_thinking_is_turned_off_by_the_effort_where_the_template_lets_it(
    client: httpx.AsyncClient, engine: Any, effort: str | None, thinks: bool
) -> None:
    await post(client, CHAT, model="thinker", reasoning_effort=effort)
    text = engine.models["thinker"].tokenizer.decode(engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert text.endswith("assistant\n" if thinks else "<think>\n\n</think>\n\n")


async def test_an_effort_that_would_be_ignored_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, "reasoning_effort": "low"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "reasoning_effort", "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"documents": [{"title": "a", "text": "b"}]}, "documents", "unsupported_parameter"),
        ({"chat_template_kwargs": {"no_think": True}}, "chat_template_kwargs.no_think", "unsupported_parameter"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "invalid_request"),
        ({"chat_template_kwargs": {"tools": []}, "model": "thinker"}, "chat_template_kwargs.tools", "invalid_request"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/tokenize"])
async def test_what_a_template_does_not_read_is_refused(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    """Templates drop it without a word: the caller would believe that it had been heard."""
    error = (await client.post(path, json={"messages": HELLO, **fields})).json()["error"]
    assert (error["param"], error["code"]) == (param, code)


async def test_what_a_template_reads_is_given_to_it(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"messages": HELLO, "model": "llama", "chat_template_kwargs": {"date_string": "3 May 2031"}}
    assert (await client.post(CHAT, json=body)).status_code == 200
    ids = engine.requests[-1].prompt_ids
    assert "3 May 2031" in engine.models["llama"].tokenizer.decode(ids, skip_special_tokens=False)


SCHEMA = {"type": "integer"}
JSON = ("json_schema", '{"type": "integer"}')
GBNF = ("lark", 'start: "a"')


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": JSON[1]}, JSON),
        ({"guided_regex": "[ab]"}, ("regex", "[ab]")),
        ({"guided_choice": ["a"]}, GBNF),
        ({"guided_grammar": GBNF[1]}, GBNF),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON),
        ({"json_schema": SCHEMA}, JSON),
        ({"json_schema": JSON[1]}, JSON),
        ({"ebnf": 'root ::= "a"'}, ("lark", 'start: "a"')),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_constraint_has_the_name_that_any_server_gives_it(
    client: httpx.AsyncClient, engine: Any, path: str, body: dict[str, Any], grammar: tuple[str, str]
) -> None:
    await post(client, path, **body)
    found = engine.requests[0].sampling.grammar
    assert (found.kind, found.text.split("\n\n")[-1].strip()) == grammar


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_what_other_servers_have_at_its_default_is_let_pass(client: httpx.AsyncClient, path: str) -> None:
    for penalty in (1, 1.0):
        await post(
            client, path, n=2, best_of=2, use_beam_search=False, length_penalty=penalty, echo=False,
            spaces_between_special_tokens=True,
        )  # fmt: skip
    await post(client, CHAT, include_reasoning=True)


async def test_the_seed_minus_one_is_a_new_one_each_time(client: httpx.AsyncClient, engine: Any) -> None:
    """It was a seed like any other: every request of a client that meant "none in particular" drew the same."""
    for seed in (-1, -1, -2, -2):
        await post(client, COMPLETIONS, seed=seed)
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2] == seeds[3] == 2**64 - 2


@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETIONS, {"max_tokens": -1}), (CHAT, {"max_tokens": -1}), (CHAT, {"max_completion_tokens": -1})],
)
async def test_minus_one_tokens_are_as_many_as_fit(
    client: httpx.AsyncClient, engine: Any, path: str, body: dict[str, Any]
) -> None:
    start = {"prompt": "Say"} if path == COMPLETIONS else {"messages": HELLO}
    assert (await client.post(path, json={**start, **body})).status_code == 200
    request = engine.requests[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens == 2048


@pytest.mark.parametrize(
    ("path", "max_tokens", "room"),
    [(COMPLETIONS, 100, 100), (COMPLETIONS, None, 16), (COMPLETIONS, -1, 512), (CHAT, 100, 100), (CHAT, None, 512)],
)
async def test_a_prompt_is_cut_to_leave_room_for_the_answer(
    client: httpx.AsyncClient, engine: Any, path: str, max_tokens: int | None, room: int
) -> None:
    long = "a" * 5000
    start = {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}
    body = {**start, "max_tokens": max_tokens, "truncate_prompt_tokens": -1}
    answer = (await client.post(path, json=body)).json()
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_ids) == 2048 - room
    assert answer["usage"]["truncated_prompt_tokens"] > 2900


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "reason"),
    [({}, None), ({"stop": ["wör", "x"]}, "wör"), ({"stop_token_ids": [108]}, None), ({"max_tokens": 3}, None)],
)
async def test_a_choice_says_which_of_the_caller_s_stops_ended_it(
    client: httpx.AsyncClient, engine: Any, path: str, body: dict[str, Any], reason: str | None
) -> None:
    if "stop_token_ids" in body:
        body = {"stop_token_ids": engine.models["tiny"].tokenizer.encode("o")}
    expected = body.get("stop_token_ids", [reason])[0]
    assert (await post(client, path, **body))["choices"][0]["stop_reason"] == expected
    *others, last = [chunk["choices"][0] for chunk in await stream(client, path, **body)]
    assert last["stop_reason"] == expected
    assert not any("stop_reason" in choice for choice in others)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_prompt_s_logprobs_come_in_vllm_s_shape(client: httpx.AsyncClient, engine: Any, path: str) -> None:
    answer = await post(client, path, prompt_logprobs=1)
    found = answer["choices"][0]["prompt_logprobs"] if path == COMPLETIONS else answer["prompt_logprobs"]
    ids = engine.requests[0].prompt_ids
    assert (len(found), found[0]) == (len(ids), None)
    text = engine.models["tiny"].tokenizer.decode([ids[1]], skip_special_tokens=False)
    assert found[1] == {str(ids[1]): {"logprob": -0.5, "rank": 1, "decoded_token": text}}
    assert "prompt_logprobs" not in json.dumps(await post(client, path))


async def test_an_echo_has_its_own_number_of_alternatives(client: httpx.AsyncClient, engine: Any) -> None:
    answer = await post(client, COMPLETIONS, prompt_logprobs=3, logprobs=1, echo=True)
    choice = answer["choices"][0]
    assert engine.requests[0].sampling.prompt_logprobs == 3
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [3, 3]
    assert [len(entry) for entry in choice["logprobs"]["top_logprobs"][1:]] == [1] * (2 + 20 - 1)


async def test_thoughts_have_both_their_names_and_are_counted(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = THOUGHT
    num_thought = len("<think>\nA greeting.")
    answer = await post(client, CHAT, model="thinker", n=2)
    message = answer["choices"][1]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "A greeting."
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * num_thought}
    chunks = await stream(client, CHAT, model="thinker", stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_thought}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    for body in ({"model": "tiny"}, {"model": "thinker", "separate_reasoning": False}):
        assert "completion_tokens_details" not in (await post(client, CHAT, **body))["usage"]


def test_what_is_said_in_the_step_that_ends_the_thoughts_is_not_counted_with_them(engine: Any) -> None:
    prompt = Prompt(ids=[97], sampling=SamplingParams(max_tokens=50), thoughts="possible")
    reader = ReplyReader(engine.models["thinker"], prompt, None)
    reader.read(Delta(0, text="<think>ab</think>Hello", num_tokens=len("<think>ab</think>Hello")))
    assert reader.num_reasoning_tokens == len("<think>ab</think>")


async def test_thoughts_are_not_told_on_request(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = THOUGHT
    answer = await post(client, CHAT, model="thinker", include_reasoning=False)
    assert "greeting" not in json.dumps(answer)
    assert answer["choices"][0]["message"]["content"] == "Hello, wörld 🦙!"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = await stream(client, CHAT, model="thinker", include_reasoning=False)
    assert not any("reasoning" in chunk["choices"][0]["delta"] for chunk in chunks)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_request_is_named_by_its_header_or_else_by_its_body(client: httpx.AsyncClient, path: str) -> None:
    start = {"prompt": "Say"} if path == COMPLETIONS else {"messages": HELLO}
    for field in ("request_id", "rid"):
        body = {**start, field: "mine-1"}
        assert (await client.post(path, json=body)).headers["x-request-id"] == "mine-1"
        named = await client.post(path, json=body, headers={"X-Request-ID": "theirs"})
        assert named.headers["x-request-id"] == "theirs"
