"""`/v1/chat/completions` over a scripted engine: prompts, shapes, tools, structured replies, streams."""

import json
from typing import Any

import httpx
import pytest

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


async def post(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": HELLO} | body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await client.post(URL, json={"messages": HELLO, "stream": True} | body)
    assert response.status_code == 200, response.text
    *lines, done = [line for line in response.text.split("\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def prompt_text(engine: Any, number: int = -1) -> str:
    request = engine.requests[number]
    model = engine.models[request.model.partition("@")[0]]
    text: str = model.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    return text


async def test_a_reply_has_its_message_the_reason_and_the_numbers(client: httpx.AsyncClient, engine: Any) -> None:
    answer = await post(client)
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Hello, wörld 🦙!", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["choices"] == [choice]
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_ids)
    assert prompt_text(engine).endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert engine.requests[0].task == "chat"


async def test_the_reply_may_fill_the_context_where_no_number_is_given(client: httpx.AsyncClient, engine: Any) -> None:
    await post(client)
    request = engine.requests[0]
    assert request.sampling.max_tokens == 2048 - len(request.prompt_ids)
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await post(client, **{name: 3})
        assert answer["choices"][0]["message"]["content"] == "Hel"
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_all_roles_and_text_parts_reach_the_template(client: httpx.AsyncClient, engine: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    await post(client, messages=messages)
    assert prompt_text(engine) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_stream_has_the_role_then_text_then_the_reason(client: httpx.AsyncClient) -> None:
    first, *middle, last = [chunk["choices"][0] for chunk in await stream(client)]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in middle) == "Hello, wörld 🦙!"
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert all(choice["finish_reason"] is None for choice in (first, *middle))


async def test_each_choice_of_a_stream_has_its_own_role_and_reason(client: httpx.AsyncClient) -> None:
    *chunks, usage = await stream(client, n=2, stream_options={"include_usage": True})
    for index in (0, 1):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in choices].count("stop") == 1
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("streamed", [True, False])
async def test_logprobs_have_bytes_and_alternatives(client: httpx.AsyncClient, engine: Any, streamed: bool) -> None:
    engine.reply = "é"
    options = {"logprobs": True, "top_logprobs": 2}
    if streamed:
        choices = [chunk["choices"][0] for chunk in await stream(client, **options)]
        found = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    else:
        found = (await post(client, **options))["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in found] == [[0xC3], [0xA9]]
    assert [len(entry["top_logprobs"]) for entry in found] == [2, 2]
    assert found[0]["token"] == "bytes:\\xc3"
    assert found[0]["logprob"] == -0.5


async def test_without_top_logprobs_only_the_token_itself_is_told(client: httpx.AsyncClient) -> None:
    found = (await post(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in found)
    assert "".join(entry["token"] for entry in found[:5]) == "Hello"


async def test_tools_are_told_to_the_model_and_calls_are_read_back(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = "Let me look.\n" + CALL
    choice = (await post(client, tools=TOOLS))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich"}
    assert '"name": "weather"' in prompt_text(engine)
    assert engine.requests[0].sampling.grammar is None


async def test_a_streamed_call_is_put_together_from_its_pieces(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = CALL + "\n" + CALL.replace("Zürich", "Bern")
    choices = [chunk["choices"][0] for chunk in await stream(client, tools=TOOLS)]
    pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    headers = [piece for piece in pieces if "id" in piece]
    assert [(piece["index"], piece["type"], piece["function"]) for piece in headers] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "weather", "arguments": ""}),
    ]
    for index, city in enumerate(("Zürich", "Bern")):
        text = "".join(piece["function"]["arguments"] for piece in pieces if piece["index"] == index)
        assert json.loads(text) == {"city": city}
    assert len(pieces) > 10
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


async def test_only_one_call_is_read_where_calls_are_not_parallel(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = CALL + CALL
    choice = (await post(client, tools=TOOLS, parallel_tool_calls=False))["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_tool_choice_none_hides_the_tools(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = CALL
    choice = (await post(client, tools=TOOLS, tool_choice="none"))["choices"][0]
    assert choice["message"]["content"] == CALL
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert "weather" not in prompt_text(engine)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "now"]), ({"type": "function", "function": {"name": "now"}}, ["now"])],
)
async def test_a_required_call_is_enforced_by_a_grammar(
    client: httpx.AsyncClient, engine: Any, choice: Any, names: list[str]
) -> None:
    engine.reply = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    answer = await post(client, tools=TOOLS, tool_choice=choice)
    grammar = engine.requests[0].sampling.grammar
    assert grammar.kind == "lark"
    assert [name for name in ("weather", "now") if f'\\"name\\": \\"{name}\\"' in grammar.text] == names
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert answer["choices"][0]["message"]["content"] is None


async def test_a_strict_tool_is_held_to_its_schema_though_the_model_is_free_to_call_it(
    client: httpx.AsyncClient, engine: Any
) -> None:
    """`strict` was taken and did nothing unless the call was required."""
    engine.reply = f"<think>x</think>{CALL}"
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    message = (await post(client, model="thinker", tools=strict))["choices"][0]["message"]
    assert (message["reasoning_content"], len(message["tool_calls"])) == ("x", 1)
    grammar = engine.requests[-1].sampling.grammar
    assert (grammar.kind, "TEXT" in grammar.text, '"city"' in grammar.text) == ("lark", True, True)
    await post(client, tools=TOOLS)
    assert engine.requests[-1].sampling.grammar is None
    response = await client.post(URL, json={"messages": HELLO, "tools": [
        {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "nope"}}}
    ]})  # fmt: skip
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"properties": {"nn": {}}}},
            }
        },
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": "{}"}},
    ],
)
async def test_tools_may_be_called_though_the_answer_has_a_format(
    client: httpx.AsyncClient, engine: Any, fields: dict[str, Any]
) -> None:
    """The format's grammar let no call through: the tools were there for nothing."""
    engine.reply = CALL
    choice = (await post(client, tools=TOOLS, **fields))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    text = engine.requests[-1].sampling.grammar.text
    assert text.startswith("start: calls | answer")
    assert ("nn" in text) == ("nn" in str(fields))


async def test_tools_do_not_go_with_a_text_that_leaves_them_no_room(client: httpx.AsyncClient) -> None:
    for fields in ({"regex": "a+"}, {"structured_outputs": {"choice": ["a", "b"]}}, {"grammar": 'start: "a"'}):
        response = await client.post(URL, json={"messages": HELLO, "tools": TOOLS, **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert await post(client, tools=TOOLS, tool_choice="none", **fields)


async def test_llama_s_own_format_is_read(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = '{"name": "weather", "parameters": {"city": "Bern"}}'
    choice = (await post(client, model="llama", tools=TOOLS))["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert choice["finish_reason"] == "tool_calls"


async def test_mistral_s_calls_are_read_and_taken_back(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}}]'
    message = (await post(client, model="mistral", tools=TOOLS))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    await post(client, model="mistral", tools=TOOLS, messages=[*HELLO, message, result])


NATIVE_CALLS = {
    "mistral-11": ('[TOOL_CALLS]weather[ARGS]{"city": "Bern"}[TOOL_CALLS]now[ARGS]{}', "[TOOL_RESULTS]rain"),
    "coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "tool\nrain",
    ),
}


@pytest.mark.parametrize("model", NATIVE_CALLS)
@pytest.mark.parametrize("streamed", [True, False])
async def test_calls_in_a_checkpoint_s_own_format_go_out_and_come_back(
    client: httpx.AsyncClient, engine: Any, model: str, streamed: bool
) -> None:
    engine.reply, result_text = NATIVE_CALLS[model]
    body = {"model": model, "tools": TOOLS}
    if streamed:
        choices = [chunk["choices"][0] for chunk in await stream(client, **body)]
        assert choices[-1]["finish_reason"] == "tool_calls"
        pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        assert sum(1 for piece in pieces if piece["index"] == 0) > 5
        functions = [
            {"name": head["function"]["name"], "arguments": "".join(
                piece["function"]["arguments"] for piece in pieces if piece["index"] == head["index"]
            )}
            for head in pieces if "id" in head
        ]  # fmt: skip
    else:
        message = (await post(client, **body))["choices"][0]["message"]
        assert message["content"] is None
        functions = [call["function"] for call in message["tool_calls"]]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in message["tool_calls"]]
        await post(client, **body, messages=[*HELLO, message, *results])
        assert result_text in prompt_text(engine)
        assert engine.reply.split("Bern")[0] in prompt_text(engine)
    assert functions == [{"name": "weather", "arguments": '{"city": "Bern"}'}, {"name": "now", "arguments": "{}"}]


async def test_a_call_that_breaks_off_is_no_finished_call(client: httpx.AsyncClient, engine: Any) -> None:
    engine.reply = CALL
    choice = (await post(client, tools=TOOLS, max_tokens=40))["choices"][0]
    assert choice["finish_reason"] == "length"
    engine.reply = CALL + CALL
    choice = (await post(client, tools=TOOLS, max_tokens=100))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}},
            "json_schema",
            json.dumps(CITY),
        ),
        ({"regex": "[ab]+"}, "regex", "[ab]+"),
        ({"grammar": 'start: "a" | "b"'}, "lark", 'start: "a" | "b"'),
    ],
)
async def test_constraints_reach_the_engine(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], kind: str | None, text: str
) -> None:
    await post(client, **body)
    grammar = engine.requests[0].sampling.grammar
    assert (kind, text) == (None, "") if grammar is None else (grammar.kind, grammar.text) == (kind, text)


async def test_llama_cpp_s_grammars_are_understood(client: httpx.AsyncClient, engine: Any) -> None:
    await post(client, grammar='root ::= "yes" | "no"')
    assert "start:" in engine.requests[0].sampling.grammar.text


async def test_the_last_message_is_continued_on_request(client: httpx.AsyncClient, engine: Any) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    await post(client, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert prompt_text(engine).endswith("<|im_start|>assistant\nWell, ")


async def test_extras_of_official_clients_are_let_pass_at_their_defaults(client: httpx.AsyncClient) -> None:
    await post(
        client,
        user="u", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True, modalities=["text"],
        safety_identifier="x", prompt_cache_key="k", audio=None, prediction=None, functions=None, reasoning_effort=None,
        logit_bias={}, stream_options=None, tools=[], stop=None, response_format=None, logprobs=None,
    )  # fmt: skip


async def test_nothing_is_stored_and_whoever_asks_for_it_is_told(client: httpx.AsyncClient) -> None:
    """`store: true`, which some clients always send, was a 400; the answer says what has become of it."""
    asked: dict[str, Any] = {"store": True, "metadata": {"run": "7"}}
    assert (await post(client, **asked))["store"] is False
    assert {chunk["store"] for chunk in await stream(client, **asked)} == {False}
    assert "store" not in await post(client, **asked | {"store": False})


async def test_a_template_s_refusal_is_the_caller_s_400(client: httpx.AsyncClient) -> None:
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL_TWICE, CALL_TWICE]}]
    response = await client.post(URL, json={"model": "llama", "messages": messages})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"] == "This model only supports single tool-calls at once!"


CALL_TWICE = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}


async def test_too_long_a_conversation_is_refused_with_the_numbers(client: httpx.AsyncClient) -> None:
    long = [{"role": "user", "content": "a" * 3000}]
    response = await client.post(URL, json={"messages": long})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    response = await client.post(URL, json={"messages": HELLO, "max_completion_tokens": 2040})
    assert response.json()["error"]["param"] == "max_completion_tokens"
    assert "prompt is too long" in error["message"]
    for found in (error, response.json()["error"]):
        assert found["message"].startswith("This model's maximum context length is 2048 tokens. ")


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    text = "wörld 🦙"
    answer = (await client.post("/v1/tokenize", json={"text": text})).json()
    assert answer["count"] == len(answer["tokens"]) == len(text.encode())
    assert [text[start:end] for start, end in answer["offsets"]][:3] == ["w", "ö", "ö"]
    assert answer["pieces"][0] == "w"
    assert answer["context_length"] == 2048
    back = (await client.post("/v1/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"model": "tiny", "model_version": "v1", "text": text, "prompt": text}


async def test_a_conversation_is_tokenized_as_it_would_be_answered(client: httpx.AsyncClient, engine: Any) -> None:
    await post(client, tools=TOOLS)
    answer = (await client.post("/v1/tokenize", json={"messages": HELLO, "tools": TOOLS})).json()
    assert answer["tokens"] == engine.requests[0].prompt_ids
    assert answer["offsets"] is None


async def test_vllms_clients_read_tokens_as_from_vllm(client: httpx.AsyncClient) -> None:
    """A text by the name of `prompt` or messages, at the root or under /v1; its fields are beside our own."""
    for asked, ours in (({"prompt": "wörld"}, {"text": "wörld"}), ({"messages": HELLO}, {"messages": HELLO})):
        expected = (await client.post("/v1/tokenize", json=ours)).json()
        assert expected["token_strs"] is None
        for path in ("/tokenize", "/v1/tokenize"):
            answer = (await client.post(path, json={**asked, "model": "tiny", "return_token_strs": True})).json()
            assert (answer["count"], answer["tokens"]) == (expected["count"], expected["tokens"])
            assert (answer["max_model_len"], answer["token_strs"]) == (2048, expected["pieces"])
    back = (await client.post("/detokenize", json={"tokens": expected["tokens"]})).json()
    assert back == (await client.post("/v1/detokenize", json={"tokens": expected["tokens"]})).json()


async def test_any_checkpoint_tokenizes(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/tokenize", json={"model": "encoder", "text": "a" * 5000})).json()
    assert answer["model"] == "encoder"
    assert answer["count"] == 5000
