"""A reply read as it comes: what the model thinks, then what it says and which tools it calls.

One object per choice. Knows a checkpoint's markers, not HTTP. API process only.
"""

from dataclasses import dataclass, field

from service.engine.models import LoadedModel
from service.tasks.call_readers import CallPiece
from service.tasks.chat import ToolUse
from service.tasks.generation import Delta, Prompt
from service.tasks.reasoning import Parts, ReasoningParser
from service.tasks.tool_calls import ToolCallParser


@dataclass(slots=True)
class Piece:
    """What a delta adds to the reply."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class ReplyReader:
    def __init__(
        self, model: LoadedModel, prompt: Prompt, tools: ToolUse | None, *, separate_reasoning: bool = True
    ) -> None:
        self._thinking: ReasoningParser | None = None
        if separate_reasoning and prompt.thoughts != "none":
            self._thinking = ReasoningParser(prompt.thoughts)
        self.num_reasoning_tokens = 0
        """Up to the last of what was thought, opening marker included."""
        self._tokenizer = model.tokenizer
        self._calling: ToolCallParser | None = None
        if tools is not None:
            functions = tools.calls.functions
            self._calling = ToolCallParser(tools.format, functions=functions, max_calls=tools.max_calls)

    def read(self, delta: Delta) -> Piece:
        ended = delta.finish_reason is not None
        parts = Parts(content=delta.text)
        if self._thinking is not None:
            parts = self._thinking.feed(delta.text)
            if ended:
                rest = self._thinking.finish()
                parts = Parts(parts.reasoning + rest.reasoning, parts.content + rest.content)
            self._count_reasoning(parts, delta.num_tokens)
        if self._calling is None:
            return Piece(parts.reasoning, parts.content)
        reading = self._calling.feed(parts.content)
        if ended:
            reading.add(self._calling.finish())
        return Piece(parts.reasoning, reading.content, reading.calls)

    @property
    def separates_reasoning(self) -> bool:
        return self._thinking is not None

    def _count_reasoning(self, parts: Parts, num_tokens: int) -> None:
        """What is already said in the delta that ends the thoughts (a step may bring many tokens) is none of them."""
        if parts.reasoning:
            said = self._tokenizer.encode(parts.content, add_special_tokens=False) if parts.content else ()
            self.num_reasoning_tokens = num_tokens - len(said)

    def finish_reason(self, reason: str) -> str:
        """OpenAI's: a reply that stopped after calling tools waits for their results."""
        called = self._calling is not None and self._calling.num_calls > 0
        return "tool_calls" if called and reason == "stop" else reason
