"""What a reply is told as to Anthropic's clients: its deltas as events that build up blocks, or the message whole.

A block is started, comes in deltas and is stopped before the next one; an event has its type as its name. A fault in
mid-stream is `service.api.event_stream`'s. API process only.
"""

import hashlib
from typing import Any

from pydantic_core import from_json

from service.api.answers_openai import UsageAnswer
from service.api.generating import new_id, usage_answer
from service.api.messages_answers import Block, MessageAnswer, MessageUsage, StopReason, Text, Thinking, ToolUse
from service.api.named_events import NamedEvents
from service.api.schemas_chat import ChatBody
from service.tasks import chat
from service.tasks.call_readers import CallPiece
from service.tasks.generation import Delta, Generation
from service.tasks.replies import ReplyReader, Said, Thought

STOP_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """`body` is the same request as chat completions take it."""

    def __init__(self, body: ChatBody, generation: Generation, tools: chat.ToolUse | None) -> None:
        self._body = body
        self._generation = generation
        self._reader = ReplyReader(generation.model, generation.prompts[0], tools)
        self._id = new_id("msg")
        self._blocks: list[Block] = []
        self._is_open = False
        """Whether the last block is under way."""
        self._arguments = ""
        """Of the last call, as far as they have come."""
        self._stop_reason: StopReason | None = None
        self._events = NamedEvents(wanted=body.stream)

    def chunk(self, delta: Delta) -> bytes:
        if not self._events.num_events:
            start = self._message(usage_answer(self._generation, self._body), [])
            self._events.add("message_start", message=start.model_dump())
        self.add(delta)
        return self._events.taken()

    def end(self, usage: UsageAnswer) -> bytes:
        whole = self._message(usage, [])
        delta = {"stop_reason": whole.stop_reason, "stop_sequence": whole.stop_sequence}
        self._events.add("message_delta", delta=delta, usage=whole.usage.model_dump())
        self._events.add("message_stop")
        return self._events.taken()

    def add(self, delta: Delta) -> None:
        for part in self._reader.read(delta):
            match part:
                case Thought():
                    self._add_thoughts(part.text)
                case Said():
                    self._add_text(part.text)
                case CallPiece():
                    self._add_call(part)
        if delta.finish_reason is not None:
            self._finish(delta.finish_reason)

    def answer(self, usage: UsageAnswer) -> MessageAnswer:
        return self._message(usage, self._blocks)

    def _message(self, usage: UsageAnswer, content: list[Block]) -> MessageAnswer:
        cached = usage.prompt_tokens_details.cached_tokens
        return MessageAnswer(
            id=self._id,
            model=self._generation.model.name,
            content=content,
            stop_reason=self._stop_reason,
            stop_sequence=self._generation.choices[0].stop_string,
            usage=MessageUsage(
                input_tokens=usage.prompt_tokens - cached,
                cache_read_input_tokens=cached,
                output_tokens=usage.completion_tokens,
            ),
        )

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _add_thoughts(self, text: str) -> None:
        block = self._block_under_way()
        if not isinstance(block, Thinking):
            block = Thinking()
            self._begin(block)
        block.thinking += text
        self._emit_delta("thinking_delta", thinking=text)

    def _add_text(self, text: str) -> None:
        block = self._block_under_way()
        if not isinstance(block, Text):
            block = Text()
            self._begin(block)
        block.text += text
        self._emit_delta("text_delta", text=text)

    def _add_call(self, call: CallPiece) -> None:
        if call.id is not None:
            self._begin(ToolUse(id=call.id, name=call.name or ""))
            self._arguments = ""
        if call.arguments:
            self._arguments += call.arguments
            self._emit_delta("input_json_delta", partial_json=call.arguments)

    def _finish(self, reason: str) -> None:
        """A message has a block at least: clients look at the first without asking."""
        if not self._blocks:
            self._begin(Text())
        self._close()
        stopped = self._generation.choices[0].stop_string is not None
        self._stop_reason = "stop_sequence" if stopped else STOP_REASONS[self._reader.finish_reason(reason)]

    def _block_under_way(self) -> Block | None:
        return self._blocks[-1] if self._is_open else None

    def _begin(self, block: Block) -> None:
        self._close()
        self._blocks.append(block)
        self._is_open = True
        self._events.add("content_block_start", index=len(self._blocks) - 1, content_block=block.model_dump())
        if len(self._blocks) == 1:
            self._events.add("ping")

    def _close(self) -> None:
        match self._block_under_way():
            case None:
                return
            case Thinking() as block:
                block.signature = _signature(block.thinking)
                self._emit_delta("signature_delta", signature=block.signature)
            case ToolUse() as block:
                block.input = _input(self._arguments)
        self._is_open = False
        self._events.add("content_block_stop", index=len(self._blocks) - 1)

    def _emit_delta(self, type: str, **fields: str) -> None:
        self._events.add("content_block_delta", index=len(self._blocks) - 1, delta={"type": type, **fields})


def _signature(thoughts: str) -> str:
    """Clients send back only thoughts that are signed. Nobody here trusts them more for it: it is a plain digest."""
    return hashlib.sha256(thoughts.encode()).hexdigest()


def _input(arguments: str) -> dict[str, Any]:
    """The object as far as it has come, which is whole unless the reply was cut off; empty where it is none."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
