"""What a model thinks before it answers, told apart from the answer: `<think>...</think>`, then the text.

Many checkpoints (Qwen3, DeepSeek's distillates, SmolLM3) write so; their chat templates show it. The rule, for reading
and for constraining alike: a reply may think where the checkpoint does, unless the request or the prompt has turned it
off; whatever the text is held to holds from the end of the thoughts on. The text comes in pieces, and what may turn out
to be a marker is held back until that is decided. One parser per text; API process only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from model.batch import Grammar
from service.engine.models import LoadedModel
from service.tasks.grammars import lark_marker, up_to

BEGIN, END = "<think>", "</think>"
SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that turns thinking on and off."""
PROMPT_END_TOKENS = 16

Thoughts = Literal["none", "possible", "begun"]
"""What a reply begins with. `begun`: in the midst of thoughts, which the prompt has opened."""


@dataclass(slots=True)
class Parts:
    reasoning: str = ""
    content: str = ""

    def add(self, other: "Parts") -> None:
        self.reasoning += other.reasoning
        self.content += other.content


def thinks(model: LoadedModel) -> bool:
    """Whether a checkpoint's chat template is one of a model that thinks."""
    template = model.chat_template
    return template is not None and any(END in source for source in template.sources.values())


def reads_effort(model: LoadedModel) -> bool:
    """Whether a checkpoint's chat template can be told how much, or whether, to think."""
    template = model.chat_template
    return template is not None and not template.variables.isdisjoint(("reasoning_effort", "enable_thinking"))


def marker_ids(model: LoadedModel) -> frozenset[int]:
    """The markers, where the tokenizer may hold them for special: they are needed to read the reply."""
    return frozenset(model.tokenizer.added_among((BEGIN, END)).values()) if thinks(model) else frozenset()


def thoughts_after(
    model: LoadedModel, prompt_ids: Sequence[int], *, variables: Mapping[str, Any], continued: str | None = None
) -> Thoughts:
    """How the reply to a prompt begins: by the template's variables, and by what the prompt ends with.

    `continued` is the message that the reply goes on with, if it is no reply of its own.
    """
    if not thinks(model):
        return "none"
    if continued is not None:
        return "begun" if continued.rfind(BEGIN) > continued.rfind(END) else "none"
    end = model.tokenizer.decode(list(prompt_ids[-PROMPT_END_TOKENS:]), skip_special_tokens=False).rstrip()
    if end.endswith(BEGIN):
        return "begun"
    is_off = end.endswith(END) or any(variables.get(name) is False for name in SWITCHES)
    return "none" if is_off else "possible"


def after_thoughts(model: LoadedModel, grammar: Grammar | None, thoughts: Thoughts) -> Grammar | None:
    """The grammar, from where the thoughts end; any text is free to be thought, but not the end of the reply."""
    if grammar is None or thoughts == "none":
        return grammar
    token_ids = model.tokenizer.added_among((BEGIN, END))
    first = "thought" if thoughts == "begun" else f"(SPACE? {lark_marker(BEGIN, token_ids)} thought)?"
    lines = [f"start: {first} SPACE? @answer", *up_to("thought", END, token_ids), r"SPACE: /[ \n]{1,4}/"]
    return replace(grammar, frame="\n".join(lines))


class ReasoningParser:
    def __init__(self, thoughts: Literal["possible", "begun"]) -> None:
        self._state: Literal["before", "thinking", "between", "answering"]
        self._state = "thinking" if thoughts == "begun" else "before"
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
