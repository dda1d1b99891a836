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
    CompletionTokensDetails,
    PromptLogprobs,
    UsageAnswer,
)
from service.api.generating import new_id, usage_answer
from service.api.schemas_chat import ChatBody
from service.api.token_logprobs import chat_logprobs, prompt_logprobs
from service.tasks.call_readers import CallPiece
from service.tasks.chat import ToolUse
from service.tasks.generation import Delta, Generation
from service.tasks.replies import Part, ReplyReader, Said, Thought


@dataclass(slots=True)
class _Choice:
    """One choice's answer in the making."""

    reader: ReplyReader
    begun: bool = False
    reasoning: str = ""
    content: str = ""
    calls: list[AnswerToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None

    def add(self, part: Part) -> None:
        match part:
            case Thought():
                self.reasoning += part.text
            case Said():
                self.content += part.text
            case CallPiece():
                if part.id is not None:
                    function = AnswerFunction(name=part.name or "", arguments="")
                    self.calls.append(AnswerToolCall(id=part.id, function=function))
                self.calls[part.index].function.arguments += part.arguments


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
            **({"store": False} if body.store else {}),
        }
        self._encoder = ChunkEncoder(self._head, include_usage=body.include_usage)
        self._generation = generation
        self._prompt_logprobs: PromptLogprobs | None = None
        self._choices = [
            _Choice(ReplyReader(model, generation.prompts[0], tools, separate_reasoning=body.separate_reasoning))
            for _ in generation.choices
        ]

    def chunk(self, delta: Delta) -> bytes:
        """OpenAI's order: the role alone, then what was thought, said and called, then the reason alone."""
        choice, index = self._choices[delta.index], delta.index
        chunks: list[ChatChunk] = []
        begins, choice.begun = not choice.begun, True
        if begins:
            chunks.append(ChatChunk(index, ChatDelta(role="assistant", content="")))
        told = [ChatChunk(index, _told(part)) for part in self._read(choice, delta)]
        logprobs = self._logprobs(delta.tokens)
        if logprobs is not None:
            _carrier(told, index).logprobs = logprobs.model_dump()
        chunks += told
        if delta.finish_reason is not None:
            reason = choice.reader.finish_reason(delta.finish_reason)
            chunks.append(ChatChunk(index, ChatDelta(), finish_reason=reason, stop_reason=delta.stop_reason))
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
        return {"usage": self._detailed(usage_answer(self._generation, self._body)).model_dump()}

    def _read(self, choice: _Choice, delta: Delta) -> list[Part]:
        """What is to be told; tokens go out by themselves, also those without text."""
        parts = [part for part in choice.reader.read(delta) if not isinstance(part, Said) or part.text]
        return parts if self._body.include_reasoning else [part for part in parts if not isinstance(part, Thought)]

    def _detailed(self, usage: UsageAnswer) -> UsageAnswer:
        """With what went into thoughts, told or not."""
        readers = [choice.reader for choice in self._choices]
        if readers[0].separates_reasoning:
            num_reasoning = sum(reader.num_reasoning_tokens for reader in readers)
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=num_reasoning)
        return usage

    @staticmethod
    def _add_ids(chunks: list[ChatChunk], delta: Delta, index: int) -> None:
        """To the delta's last chunk: nothing is certain of the text of some ids, and they must not be lost."""
        if delta.ids and not chunks:
            chunks.append(ChatChunk(index, ChatDelta(content="")))
        if chunks:
            chunks[-1].token_ids = delta.ids

    def end(self, usage: UsageAnswer) -> bytes:
        return (self._encoder.usage(self._detailed(usage)) if self._body.include_usage else b"") + DONE

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        if self._body.prompt_logprobs is not None and delta.index == 0 and self._prompt_logprobs is None:
            self._prompt_logprobs = prompt_logprobs(self._tokenizer, delta.prompt_logprobs, self._body.prompt_logprobs)
        for part in self._read(choice, delta):
            choice.add(part)
        choice.logprobs += delta.tokens
        choice.ids += delta.ids
        if delta.finish_reason is not None:
            choice.finish_reason = choice.reader.finish_reason(delta.finish_reason)
            choice.stop_reason = delta.stop_reason

    def answer(self, usage: UsageAnswer) -> ChatAnswer:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(
                    content=choice.content or (None if choice.calls or choice.reasoning else ""),
                    reasoning_content=choice.reasoning or None,
                    reasoning=choice.reasoning or None,
                    tool_calls=choice.calls or None,
                ),
                logprobs=self._logprobs(choice.logprobs, always=True),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                token_ids=choice.ids if self._body.return_token_ids else None,
            )
            for index, choice in enumerate(self._choices)
        ]
        head = {**self._head, "object": "chat.completion"}
        of_prompt = {
            "prompt_token_ids": self._generation.prompts[0].read_ids if self._body.return_token_ids else None,
            "prompt_logprobs": self._prompt_logprobs,
        }
        return ChatAnswer.model_validate({**head, "choices": choices, "usage": self._detailed(usage), **of_prompt})

    def _logprobs(self, tokens: Sequence[TokenLogprobs], *, always: bool = False) -> ChatLogprobs | None:
        if not self._body.logprobs or not (tokens or always):
            return None
        return ChatLogprobs(content=chat_logprobs(self._tokenizer, tokens))


def _told(part: Part) -> ChatDelta:
    match part:
        case Thought():
            return ChatDelta(reasoning_content=part.text, reasoning=part.text)
        case Said():
            return ChatDelta(content=part.text)
        case CallPiece():
            function = CallFunctionChunk(name=part.name, arguments=part.arguments)
            type = None if part.id is None else "function"
            return ChatDelta(tool_calls=[CallChunk(part.index, id=part.id, type=type, function=function)])


def _carrier(chunks: list[ChatChunk], index: int) -> ChatChunk:
    """The chunk that log-probabilities go out with: the first that has content, if need be an empty one at the end."""
    for chunk in chunks:
        if chunk.delta.content is not None:
            return chunk
    chunks.append(ChatChunk(index, ChatDelta(content="")))
    return chunks[-1]
