"""A reply is the same in whatever deltas it comes: for the reader and for each writer, with logprobs and without."""

import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from model.batch import SamplingParams, TokenLogprobs
from service.api.answers_openai import PromptTokensDetails, UsageAnswer
from service.api.chat import tool_use_of
from service.api.chat_writer import ChatWriter
from service.api.message_writer import MessageWriter
from service.api.response_writer import ResponseWriter
from service.api.responses import chat_body
from service.api.schemas_chat import ChatBody
from service.api.schemas_responses import ResponsesBody
from service.engine.models import LoadedModel
from service.engine.protocol import TokenOutput
from service.tasks.call_readers import CallPiece
from service.tasks.generation import Choice, Delta, Generation, Prompt
from service.tasks.replies import Part, ReplyReader, Said, Thought

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"c": {"type": "string"}}}}
MODEL = "special-thinker"
CALL = '<tool_call>{"name": "f", "arguments": {"c":"é"}}\n</tool_call>'
CALLED = '{"name": "f", "arguments": {}}'
REPLIES = {
    "thought, said, called, said": f"<think>a\n\nb\n</think>\nOn < é\n{CALL}\nOk\n",
    "called twice": f"<tool_call>{CALLED}</tool_call>\n<tool_call>{CALLED}</tool_call>",
    "not called": '<think>\n</think>1 <<2 <tool_call>{"name": "a\\q", "arguments": {}} é',
}
USAGE = UsageAnswer(prompt_tokens=1, completion_tokens=1, total_tokens=2, prompt_tokens_details=PromptTokensDetails())
EOS = 258


class Stream:
    """Outputs as they come from the engine."""

    def __init__(self, outputs: list[TokenOutput]) -> None:
        self.outputs, self.timings = outputs, SimpleNamespace()

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        for output in self.outputs:
            yield output

    def cancel(self, outcome: str = "cancelled") -> None: ...


def cuts(num_tokens: int, step: int) -> Iterator[list[int]]:
    """Ends of outputs: one token each; cut at any two places; one each, but for two or seven that came together.

    Of the places every `step`th is tried.
    """
    ends = list(range(1, num_tokens + 1))
    yield ends
    for first, second in itertools.combinations(ends[:-1:step], 2):
        yield [first, second, num_tokens]
    for size in (2, 7):
        for start in range(0, num_tokens - size, step):
            yield [end for end in ends if not start < end < start + size]


def outputs(ids: list[int], ends: list[int], *, logprobs: bool) -> list[TokenOutput]:
    found = []
    for start, end in itertools.pairwise([0, *ends]):
        reason = "stop" if end == len(ids) else None
        told = [TokenLogprobs(id, -0.5, (), ()) for id in ids[start:end]] if logprobs else []
        found.append(TokenOutput(request_id=0, token_ids=ids[start:end], logprobs=told, finish_reason=reason))  # type: ignore[arg-type]
    return found


def generation_of(model: LoadedModel, ids: list[int], ends: list[int], logprobs: bool) -> Generation:
    sampling = SamplingParams(max_tokens=500, stop_ids=frozenset({EOS}), logprobs=0 if logprobs else None)
    prompt = Prompt(ids=[97], sampling=sampling, thoughts="possible", keep_special=frozenset(range(259, 270)))
    stream: Any = Stream(outputs(ids, ends, logprobs=logprobs))
    return Generation(model, [prompt], [Choice(0, prompt, model.tokenizer, stream)])


async def deltas_of(
    model: LoadedModel, reply: str, logprobs: bool, step: int = 1
) -> AsyncIterator[tuple[Generation, list[Delta]]]:
    """Of the same reply, each time cut otherwise."""
    ids = [*model.tokenizer.encode(reply, add_special_tokens=False), EOS]
    for ends in cuts(len(ids), step):
        generation = generation_of(model, ids, ends, logprobs)
        yield generation, [delta async for delta in generation]


def chat(**fields: Any) -> ChatBody:
    tools = [{"type": "function", "function": FUNCTION}]
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools, **fields})


def whole(parts: list[Part]) -> list[Any]:
    """Parts as they are in all: neighbours of a kind together, without the random ids."""
    found: list[Any] = []
    for part in parts:
        match part:
            case CallPiece(id=None):
                found[-1][1] += part.arguments
            case CallPiece():
                found.append([part.name, part.arguments])
            case Thought() | Said():
                texts = [part.text, [token.token_id for token in part.tokens] if isinstance(part, Said) else None]
                if found and found[-1][0] is type(part):
                    found[-1][1] += texts[0]
                    found[-1][2] += texts[1] or []
                else:
                    found.append([type(part), texts[0], texts[1] or []])
    return found


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
async def test_what_is_read_and_in_which_order_does_not_depend_on_the_deltas(
    engine: Any, reply: str, logprobs: bool
) -> None:
    """Content that came in one delta with the rest of a call was told before it."""
    model, body = engine.models[MODEL], chat()
    first = None
    async for generation, deltas in deltas_of(model, reply, logprobs):
        reader = ReplyReader(model, generation.prompts[0], tool_use_of(body, model))
        found = whole([part for delta in deltas for part in reader.read(delta)])
        first = found if first is None else first
        assert found == first


async def test_a_text_has_the_tokens_that_begin_in_it_and_no_marker_s(engine: Any) -> None:
    model, body = engine.models[MODEL], chat()
    for reply in REPLIES.values():
        ids = model.tokenizer.encode(reply, add_special_tokens=False)
        generation = generation_of(model, [*ids, EOS], list(range(1, len(ids) + 2)), True)
        reader = ReplyReader(model, generation.prompts[0], tool_use_of(body, model))
        for part in whole([part async for delta in generation for part in reader.read(delta)]):
            if part[0] is Said:
                assert model.tokenizer.decode(part[2], skip_special_tokens=False) == part[1]


def chat_writer(generation: Generation, logprobs: bool, stream: bool) -> Any:
    body = chat(logprobs=logprobs, stream=stream)
    return ChatWriter(body, generation, tool_use_of(body, generation.model))


def message_writer(generation: Generation, logprobs: bool, stream: bool) -> Any:
    body = chat(stream=stream)
    return MessageWriter(body, generation, tool_use_of(body, generation.model))


def response_writer(generation: Generation, logprobs: bool, stream: bool) -> Any:
    include = ["message.output_text.logprobs"] if logprobs else []
    body = ResponsesBody.model_validate(
        {"input": "x", "include": include, "stream": stream, "tools": [{"type": "function", **FUNCTION}]}
    )
    return ResponseWriter(body, generation, tool_use_of(chat_body(body), generation.model))


def of_chat(stream: bytes) -> list[Any]:
    """What a client makes of the chunks: kinds in their order, neighbours put together."""
    found: list[Any] = []
    for line in stream.decode().split("\n\n")[:-2]:
        delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for kind in ("reasoning_content", "content"):
            if delta.get(kind):
                add(found, kind, delta[kind])
        for call in delta.get("tool_calls", []):
            add(found, f"call {call['index']}", call["function"]["arguments"])
    return found


def of_events(stream: bytes) -> list[Any]:
    found: list[Any] = []
    for event in stream.decode().split("\n\n")[:-1]:
        data = json.loads(event.partition("\ndata: ")[2])
        kind, index = data["type"], data.get("output_index", data.get("index"))
        if kind in ("content_block_start", "response.output_item.added"):
            found.append([index, (data.get("item") or data.get("content_block"))["type"], ""])
        elif kind == "content_block_delta":
            found[index][2] += "".join(v for k, v in data["delta"].items() if k not in ("type", "signature"))
        elif kind.endswith(".delta"):
            found[index][2] += data["delta"]
    return found


def add(found: list[Any], kind: str, text: str) -> None:
    if found and found[-1][0] == kind:
        found[-1][1] += text
    else:
        found.append([kind, text])


UNSTABLE = ("id", "call_id", "created", "created_at", "completion_tokens_details", "output_tokens_details")
"""Made up for each answer, or (thoughts' tokens, where a step ends them and goes on) an estimate."""


def stable(value: Any) -> Any:
    if isinstance(value, list):
        return [stable(entry) for entry in value]
    return {k: stable(v) for k, v in value.items() if k not in UNSTABLE} if isinstance(value, dict) else value


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize(
    ("make", "read"),
    [(chat_writer, of_chat), (message_writer, of_events), (response_writer, of_events)],
    ids=["chat", "messages", "responses"],
)
async def test_each_writer_tells_the_same_whatever_the_deltas(
    engine: Any, make: Callable[..., Any], read: Callable[[bytes], Any], reply: str, logprobs: bool
) -> None:
    first = None
    async for generation, deltas in deltas_of(engine.models[MODEL], reply, logprobs, step=4):
        streaming, collecting = make(generation, logprobs, True), make(generation, logprobs, False)
        streamed = read(b"".join(streaming.chunk(delta) for delta in deltas))
        for delta in deltas:
            collecting.add(delta)
        found = streamed, stable(collecting.answer(USAGE.model_copy()).model_dump())
        first = found if first is None else first
        assert found == first
