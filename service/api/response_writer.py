"""What a response is told as: its deltas as events that build up items, or the items whole.

OpenAI's conventions: an item is added, its text or arguments come in deltas, then the whole of each is told again. One
item is open at a time. API process only.
"""

import time
from typing import Any, TypeVar

from service.api.answers_openai import UsageAnswer
from service.api.generating import new_id
from service.api.named_events import NamedEvents
from service.api.responses_answers import (
    FunctionCall,
    IncompleteDetails,
    InputTokensDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseAnswer,
    ResponseUsage,
    Status,
)
from service.api.schemas_responses import ResponsesBody
from service.api.token_logprobs import chat_logprobs
from service.tasks.call_readers import CallPiece
from service.tasks.chat import ToolUse
from service.tasks.generation import Delta, Generation
from service.tasks.replies import ReplyReader, Said, Thought

Content = TypeVar("Content", ReasoningText, OutputText)


class ResponseWriter:
    def __init__(self, body: ResponsesBody, generation: Generation, tools: ToolUse | None) -> None:
        self._generation = generation
        self._reader = ReplyReader(generation.model, generation.prompts[0], tools)
        self._head = _head(body, generation)
        self._items: list[OutputItem] = []
        self._events = NamedEvents(wanted=body.stream)
        self._finish_reason = ""

    def chunk(self, delta: Delta) -> bytes:
        if not self._events.num_events:
            self._emit("response.created", response=self._response("in_progress"))
            self._emit("response.in_progress", response=self._response("in_progress"))
        self.add(delta)
        return self._events.taken()

    def end(self, usage: UsageAnswer) -> bytes:
        answer = self.answer(usage)
        self._emit(f"response.{answer.status}", response=answer.model_dump(mode="json"))
        return self._events.taken()

    def add(self, delta: Delta) -> None:
        for part in self._reader.read(delta):
            match part:
                case Thought():
                    self._add_reasoning(part.text)
                case Said():
                    self._add_text(part)
                case CallPiece():
                    self._add_call(part)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            if not self._items:
                self._add_text(Said(""))
            self._close("incomplete" if delta.finish_reason == "length" else "completed")

    def answer(self, usage: UsageAnswer) -> ResponseAnswer:
        cut = self._finish_reason == "length"
        return ResponseAnswer(
            **self._head,
            status="incomplete" if cut else "completed",
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            output=self._items,
            usage=ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=self._reader.num_reasoning_tokens),
                total_tokens=usage.total_tokens,
            ),
        )

    def _response(self, status: Status) -> dict[str, Any]:
        return ResponseAnswer(**self._head, status=status, output=[]).model_dump(mode="json")

    # -- items --------------------------------------------------------------------------------------------------------

    def _add_reasoning(self, text: str) -> None:
        item = self._open_item()
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(id=new_id("rs"))
            self._begin(item)
            self._begin_part(item, item.content, ReasoningText())
        item.content[0].text += text
        self._emit("response.reasoning_text.delta", **self._part(item), delta=text)

    def _add_text(self, said: Said) -> None:
        item = self._open_item()
        if not isinstance(item, OutputMessage):
            item = OutputMessage(id=new_id("msg"))
            self._begin(item)
            self._begin_part(item, item.content, OutputText())
        logprobs = chat_logprobs(self._generation.model.tokenizer, said.tokens)
        item.content[0].text += said.text
        item.content[0].logprobs += logprobs
        told = [entry.model_dump() for entry in logprobs]
        self._emit("response.output_text.delta", **self._part(item), delta=said.text, logprobs=told)

    def _add_call(self, call: CallPiece) -> None:
        if call.id is not None:
            self._begin(FunctionCall(id=new_id("fc"), call_id=call.id, name=call.name or ""))
        item = self._items[-1]
        assert isinstance(item, FunctionCall), "a call's arguments follow its name"
        if call.arguments:
            item.arguments += call.arguments
            self._emit("response.function_call_arguments.delta", **self._place(item), delta=call.arguments)

    def _open_item(self) -> OutputItem | None:
        return self._items[-1] if self._items and self._items[-1].status == "in_progress" else None

    def _begin(self, item: OutputItem) -> None:
        self._close("completed")
        self._items.append(item)
        self._emit("response.output_item.added", output_index=len(self._items) - 1, item=item.model_dump(mode="json"))

    def _begin_part(self, item: OutputItem, content: list[Content], part: Content) -> None:
        """Of a text, which has one part alone."""
        content.append(part)
        self._emit("response.content_part.added", **self._part(item), part=part.model_dump())

    def _close(self, status: Status) -> None:
        item = self._open_item()
        if item is None:
            return
        item.status = status
        match item:
            case ReasoningItem(content=[part]):
                self._emit("response.reasoning_text.done", **self._part(item), text=part.text)
                self._emit("response.content_part.done", **self._part(item), part=part.model_dump())
            case OutputMessage(content=[text]):
                told = text.model_dump(mode="json")
                self._emit("response.output_text.done", **self._part(item), text=text.text, logprobs=told["logprobs"])
                self._emit("response.content_part.done", **self._part(item), part=told)
            case FunctionCall():
                self._emit(
                    "response.function_call_arguments.done",
                    **self._place(item), name=item.name, arguments=item.arguments,
                )  # fmt: skip
        self._emit("response.output_item.done", output_index=len(self._items) - 1, item=item.model_dump(mode="json"))

    def _place(self, item: OutputItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self._items) - 1}

    def _part(self, item: OutputItem) -> dict[str, Any]:
        return {**self._place(item), "content_index": 0}

    def _emit(self, type: str, **fields: Any) -> None:
        self._events.add(type, **fields, sequence_number=self._events.num_events)


def _head(body: ResponsesBody, generation: Generation) -> dict[str, Any]:
    """What is the same in all that is told of a response."""
    choice = body.tool_choice or "auto"
    text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text is not None else {}
    return {
        "id": new_id("resp"),
        "created_at": int(time.time()),
        "model": generation.model.name,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning": body.reasoning.model_dump(exclude_none=True) if body.reasoning is not None else None,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools],
        "top_p": body.top_p,
        "user": body.user,
    }
