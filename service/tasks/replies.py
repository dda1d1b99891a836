"""A reply read as it comes: what the model thinks, then what it says and which tools it calls.

What comes out in all does not depend on how the reply was cut into deltas. One object per choice. Knows a checkpoint's
markers, not HTTP. API process only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from model.batch import TokenLogprobs
from service.engine.models import LoadedModel
from service.tasks.call_readers import CallPiece
from service.tasks.chat import ToolUse
from service.tasks.generation import Delta, Prompt
from service.tasks.reasoning import Parts, ReasoningParser
from service.tasks.tool_calls import ToolCallParser


@dataclass(slots=True)
class Thought:
    text: str


@dataclass(slots=True)
class Said:
    text: str
    tokens: list[TokenLogprobs] = field(default_factory=list)
    """Those that begin in the text, where log-probabilities are asked for. A marker's, or a call's, are in no text."""


Part = Thought | Said | CallPiece


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
        self._num_chars = 0
        """Of the choice's text, read so far."""
        self._waiting: list[tuple[int, TokenLogprobs]] = []
        """Tokens, and where they begin, of which it is not certain yet what they belong to."""
        self._says = True
        """Whether the last part was said, or nothing has come."""

    def read(self, delta: Delta) -> list[Part]:
        """What a delta adds to the reply, in the order in which it was written."""
        found: list[Part] = []
        read = Parts()
        for text in self._texts(delta):
            self._num_chars += len(text)
            parts = Parts(content=text) if self._thinking is None else self._thinking.feed(text)
            self._tell(found, parts)
            read.add(parts)
        if delta.finish_reason is not None:
            rest = Parts() if self._thinking is None else self._thinking.finish()
            self._tell(found, rest)
            read.add(rest)
            self._finish(found)
        self._count_reasoning(read, delta.num_tokens)
        return found

    @property
    def separates_reasoning(self) -> bool:
        return self._thinking is not None

    def finish_reason(self, reason: str) -> str:
        """OpenAI's: a reply that stopped after calling tools waits for their results."""
        called = self._calling is not None and self._calling.num_calls > 0
        return "tool_calls" if called and reason == "stop" else reason

    def _texts(self, delta: Delta) -> Iterator[str]:
        """The delta's text, token by token where these are known; each waits from then on.

        Worked example: "Hi ho" behind 10 characters, tokens at 10 and 12: "", "Hi", " ho".
        """
        bounds = [offset - self._num_chars for offset in delta.offsets] + [len(delta.text)]
        yield delta.text[: bounds[0]]
        for number, token in enumerate(delta.tokens):
            self._waiting.append((delta.offsets[number], token))
            yield delta.text[bounds[number] : bounds[number + 1]]

    def _tell(self, found: list[Part], parts: Parts) -> None:
        if parts.reasoning:
            self._add(found, Thought(parts.reasoning))
        if parts.content:
            self._tell_content(found, [parts.content] if self._calling is None else self._calling.feed(parts.content))

    def _tell_content(self, found: list[Part], parts: Iterable[str | CallPiece]) -> None:
        for part in parts:
            self._add(found, Said(part, self._tokens_of(part)) if isinstance(part, str) else part)

    def _finish(self, found: list[Part]) -> None:
        if self._calling is not None:
            self._tell_content(found, self._calling.finish())
        hidden = [token for start, token in self._waiting if start == self._num_chars]
        if hidden and self._says:  # tokens without text, behind what was said
            self._add(found, Said("", hidden))

    def _add(self, found: list[Part], part: Part) -> None:
        self._says = isinstance(part, Said)
        if not self._says:
            self._waiting.clear()
        match found[-1:], part:
            case [Thought() as last], Thought():
                last.text += part.text
            case [Said() as last], Said():
                last.text += part.text
                last.tokens += part.tokens
            case [CallPiece(id=None) as last], CallPiece(id=None):
                last.arguments += part.arguments
            case _:
                found.append(part)

    def _tokens_of(self, text: str) -> list[TokenLogprobs]:
        """Takes the waiting tokens that begin in the text, which ends where what is held back begins.

        Earlier ones, of markers and of white space around them, are dropped; later ones go on waiting.
        """
        if not self._waiting:
            return []
        end = self._num_chars - (0 if self._calling is None else self._calling.num_held)
        start = end - len(text)
        waiting, tokens = self._waiting, []
        ends = [*(begin for begin, _ in waiting[1:]), self._num_chars]
        self._waiting = [entry for entry in waiting if entry[0] >= end]
        for (begin, token), token_end in zip(waiting, ends, strict=True):
            if begin < end and (begin >= start or token_end > start):
                tokens.append(token)
        return tokens

    def _count_reasoning(self, read: Parts, num_tokens: int) -> None:
        """What is already said in the delta that ends the thoughts (a step may bring many tokens) is none of them."""
        if read.reasoning:
            said = self._tokenizer.encode(read.content, add_special_tokens=False) if read.content else ()
            self.num_reasoning_tokens = num_tokens - len(said)
