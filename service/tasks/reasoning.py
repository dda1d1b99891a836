"""What a model thinks before it answers, told apart from the answer: `<think>...</think>`, then the text.

Many checkpoints (Qwen3, DeepSeek's distillates, SmolLM3) write so; their chat templates show it. The text comes in
pieces, and what may turn out to be a marker is held back until that is decided. One object per text; API process only.
"""

from dataclasses import dataclass
from typing import Literal

from service.engine.models import LoadedModel

BEGIN, END = "<think>", "</think>"


@dataclass(slots=True)
class Parts:
    reasoning: str = ""
    content: str = ""


def thinks(model: LoadedModel) -> bool:
    """Whether a checkpoint's chat template is one of a model that thinks."""
    template = model.chat_template
    return template is not None and any(END in source for source in template.sources.values())


def reads_effort(model: LoadedModel) -> bool:
    """Whether a checkpoint's chat template can be told how much, or whether, to think."""
    template = model.chat_template
    return template is not None and not template.variables.isdisjoint(("reasoning_effort", "enable_thinking"))


def marker_ids(model: LoadedModel) -> frozenset[int]:
    """The markers that the tokenizer holds for special: they are needed to read the reply."""
    if not thinks(model):
        return frozenset()
    ids = [model.tokenizer.token_id(marker) for marker in (BEGIN, END)]
    return frozenset(id for id in ids if id is not None and model.tokenizer.is_special(id))


class ReasoningParser:
    def __init__(self, prompt_end: str) -> None:
        """`prompt_end` is the end of the prompt's text: some templates open the thinking themselves."""
        opened = prompt_end.rstrip().endswith(BEGIN)
        self._state: Literal["before", "thinking", "between", "answering"] = "thinking" if opened else "before"
        self._held = ""
        self._begun = False
        """Whether anything but white space has been thought."""

    def feed(self, text: str) -> Parts:
        parts = Parts()
        text = self._held + text
        self._held = ""
        if self._state == "before":
            text = self._begin(text)
        if self._state == "thinking":
            text = self._think(text, parts)
        if self._state == "between":
            text = text.lstrip()
            self._state = "answering" if text else "between"
        if self._state == "answering":
            parts.content += text
        return parts

    def finish(self) -> Parts:
        """What was held back, now that nothing follows it."""
        text, self._held = self._held, ""
        return Parts(reasoning=text) if self._state == "thinking" else Parts(content=text)

    def _begin(self, text: str) -> str:
        """Decides whether the text begins with the marker; returns what is behind it, or all of it."""
        begun = text.lstrip()
        if begun.startswith(BEGIN):
            self._state = "thinking"
            return begun[len(BEGIN) :]
        if BEGIN.startswith(begun):
            self._held = text
            return ""
        self._state = "answering"
        return text

    def _think(self, text: str, parts: Parts) -> str:
        """Adds what is thought; returns what is behind the end of it. The white space around it is not thought."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        end = text.find(END)
        if end >= 0:
            parts.reasoning += text[:end].rstrip()
            self._state = "between"
            return text[end + len(END) :]
        kept = len(text) - _undecided(text)
        parts.reasoning += text[:kept]
        self._held = text[kept:]
        return ""


def _undecided(text: str) -> int:
    """Characters at the end that may belong to the marker or be the white space before it."""
    for length in range(min(len(END) - 1, len(text)), 0, -1):
        if END.startswith(text[-length:]):
            return length + len(text[:-length]) - len(text[:-length].rstrip())
    return len(text) - len(text.rstrip())
