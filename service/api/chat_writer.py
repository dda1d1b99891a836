"""What a reply is told as: its deltas as chunks of a stream, or put together to one message, tool calls read out.

OpenAI's conventions, and vLLM's for token ids. API process only.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.batch import TokenLogprobs
from service.api.answers_openai import (
    DONE,
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    CallChunk,
    CallFunctionChunk,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChunkEncoder,
    UsageAnswer,
)
from service.api.generating import new_id, usage_answer
from service.api.schemas_chat import ChatBody
from service.api.token_logprobs import chat_logprobs
from service.tasks.chat import ToolUse
from service.tasks.generation import Delta, Generation
from service.tasks.reasoning import Parts, ReasoningParser, thinks
from service.tasks.tool_calls import CallPiece, Reading, ToolCallParser

PROMPT_END_TOKENS = 8


@dataclass(slots=True)
class _ChoiceState:
    """One choice's answer in the making: first what it thinks, then what it says and which tools it calls."""

    thinking: ReasoningParser | None
    calling: ToolCallParser | None
    begun: bool = False
    reasoning: str = ""
    content: str = ""
    calls: list[AnswerToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def read(self, delta: Delta) -> tuple[str, Reading]:
        """What the delta thinks, and what it says and calls."""
        ended = delta.finish_reason is not None
        parts = Parts(content=delta.text)
        if self.thinking is not None:
            parts = self.thinking.feed(delta.text)
            if ended:
                rest = self.thinking.finish()
                parts = Parts(parts.reasoning + rest.reasoning, parts.content + rest.content)
        if self.calling is None:
            return parts.reasoning, Reading(parts.content)
        reading = self.calling.feed(parts.content)
        if ended:
            reading.add(self.calling.finish())
        return parts.reasoning, reading

    def finish(self, reason: str) -> str:
        """OpenAI's reason: a reply that stopped after calling tools waits for their results."""
        called = self.calling is not None and self.calling.num_calls > 0
        return "tool_calls" if called and reason == "stop" else reason


class ChatWriter:
    def __init__(self, body: ChatBody, generation: Generation, tools: ToolUse | None) -> None:
        model = generation.model
        self._body = body
        self._tokenizer = model.tokenizer
        self._head: dict[str, object] = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.version,
        }
        self._encoder = ChunkEncoder(self._head, include_usage=body.include_usage)
        self._generation = generation
        self._choices = [_ChoiceState(_thinking(body, generation), _calling(tools)) for _ in generation.choices]

    def chunk(self, delta: Delta) -> bytes:
        """OpenAI's order: the role alone, then reasoning, content and calls, then the reason alone."""
        choice, index = self._choices[delta.index], delta.index
        chunks: list[ChatChunk] = []
        begins, choice.begun = not choice.begun, True
        if begins:
            chunks.append(ChatChunk(index, ChatDelta(role="assistant", content="")))
        reasoning, reading = choice.read(delta)
        if reasoning:
            chunks.append(ChatChunk(index, ChatDelta(reasoning_content=reasoning)))
        logprobs = self._logprobs(delta.tokens)
        if reading.content or logprobs is not None:
            built = None if logprobs is None else logprobs.model_dump()
            chunks.append(ChatChunk(index, ChatDelta(content=reading.content), logprobs=built))
        chunks += [ChatChunk(index, ChatDelta(tool_calls=[_call_chunk(piece)])) for piece in reading.calls]
        if delta.finish_reason is not None:
            chunks.append(ChatChunk(index, ChatDelta(), finish_reason=choice.finish(delta.finish_reason)))
        if self._body.return_token_ids:
            self._add_ids(chunks, delta, index)
        more = self._usage_so_far()
        encoded = [self._encoder.choice(chunk, more) for chunk in chunks]
        if begins and self._body.return_token_ids:
            ids = {"prompt_token_ids": self._generation.prompts[0].read_ids}
            encoded[0] = self._encoder.choice(chunks[0], {**more, **ids})
        return b"".join(encoded)

    def _usage_so_far(self) -> dict[str, object]:
        if not self._body.continuous_usage:
            return {}
        return {"usage": usage_answer(self._generation, self._body).model_dump()}

    @staticmethod
    def _add_ids(chunks: list[ChatChunk], delta: Delta, index: int) -> None:
        """To the delta's last chunk: nothing is certain of the text of some ids, and they must not be lost."""
        if delta.ids and not chunks:
            chunks.append(ChatChunk(index, ChatDelta(content="")))
        if chunks:
            chunks[-1].token_ids = delta.ids

    def end(self, usage: UsageAnswer) -> bytes:
        return (self._encoder.usage(usage) if self._body.include_usage else b"") + DONE

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        reasoning, reading = choice.read(delta)
        choice.reasoning += reasoning
        choice.content += reading.content
        choice.logprobs += delta.tokens
        choice.ids += delta.ids
        for piece in reading.calls:
            if piece.id is not None:
                function = AnswerFunction(name=piece.name or "", arguments="")
                choice.calls.append(AnswerToolCall(id=piece.id, function=function))
            choice.calls[piece.index].function.arguments += piece.arguments
        if delta.finish_reason is not None:
            choice.finish_reason = choice.finish(delta.finish_reason)

    def answer(self, usage: UsageAnswer) -> ChatAnswer:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(
                    content=choice.content or (None if choice.calls or choice.reasoning else ""),
                    reasoning_content=choice.reasoning or None,
                    tool_calls=choice.calls or None,
                ),
                logprobs=self._logprobs(choice.logprobs, always=True),
                finish_reason=choice.finish_reason,
                token_ids=choice.ids if self._body.return_token_ids else None,
            )
            for index, choice in enumerate(self._choices)
        ]
        head = {**self._head, "object": "chat.completion"}
        prompt_ids = self._generation.prompts[0].read_ids if self._body.return_token_ids else None
        return ChatAnswer.model_validate({**head, "choices": choices, "usage": usage, "prompt_token_ids": prompt_ids})

    def _logprobs(self, tokens: Sequence[TokenLogprobs], *, always: bool = False) -> ChatLogprobs | None:
        if not self._body.logprobs or not (tokens or always):
            return None
        return ChatLogprobs(content=chat_logprobs(self._tokenizer, tokens))


def _thinking(body: ChatBody, generation: Generation) -> ReasoningParser | None:
    """None where the model does not think, may not (its text is constrained), or the caller wants all as one."""
    model, prompt = generation.model, generation.prompts[0]
    if not body.separate_reasoning or prompt.sampling.grammar is not None or not thinks(model):
        return None
    return ReasoningParser(model.tokenizer.decode(prompt.ids[-PROMPT_END_TOKENS:], skip_special_tokens=False))


def _calling(tools: ToolUse | None) -> ToolCallParser | None:
    return None if tools is None else ToolCallParser(tools.format, max_calls=tools.max_calls)


def _call_chunk(piece: CallPiece) -> CallChunk:
    function = CallFunctionChunk(name=piece.name, arguments=piece.arguments)
    begins = piece.id is not None
    return CallChunk(piece.index, id=piece.id, type="function" if begins else None, function=function)
