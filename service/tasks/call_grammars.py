"""Grammars of replies that call tools: that must, that may instead of answering in JSON, that may in the midst of text.

Lark, as llguidance takes it. The arguments of each tool are a schema of their own, so that references within it
(`#/$defs/...`, as pydantic writes them) are found. Knows nothing of HTTP or tokens. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.grammar_check import WHITESPACE
from service.tasks.grammars import lark_marker, up_to
from service.tasks.tools import HERMES, LLAMA3, ToolFormat

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As the formats' examples are written; free white space is where weak models get lost."""

NO_OBJECT = r"NO_OBJECT: /[ \n\t]*([^{ \n\t](.|\n)*)?/"
"""Llama 3's calls stand alone, from the first character on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallGrammar:
    """The tools that may be called (OpenAI's function definitions), in a checkpoint's format.

    `token_ids` are the markers that are tokens of their own: a grammar names them by id, or they would have to be
    written in letters, which no model has learned.
    """

    format: ToolFormat
    functions: Sequence[Mapping[str, Any]]
    parallel: bool = True
    token_ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_strict(self) -> bool:
        """Whether some tool's arguments are promised to fit its schema, however free the model is to call it."""
        return any(function.get("strict") for function in self.functions)

    def required(self) -> str:
        """One call, or (with `parallel`) several; arguments fit the schemas of their tools."""
        return "\n".join(("start: calls", *self._calls(), *self._call(every=True)))

    def or_json(self, schema: Mapping[str, Any]) -> str:
        """Calls, or an answer that fits the schema."""
        answer = "answer: %json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})
        return "\n".join(("start: calls | answer", answer, *self._calls(), *self._call(every=True)))

    def or_text(self) -> str:
        """Any text; a call in it is one of the tools', and arguments of the strict ones fit their schemas."""
        call = self._call(every=False)
        if self.format is LLAMA3:
            start = f"start: calls | {self._begin} calls | NO_OBJECT"
            return "\n".join((start, NO_OBJECT, *self._calls(), *call))
        many = "*" if self.parallel and self.format is HERMES else "?"
        more = ' (", " call)*' if self.parallel else ""
        body = f'"\\n"? call "\\n"? {self._end}' if self.format is HERMES else f'" "? "[" call{more} "]"'
        opening = up_to("opening", self.format.begin, self.token_ids)
        return "\n".join((f"start: (opening {body}){many} TEXT", *opening, *call))

    @property
    def _begin(self) -> str:
        return lark_marker(self.format.begin, self.token_ids)

    @property
    def _end(self) -> str:
        return lark_marker(self.format.end, self.token_ids)

    def _calls(self) -> list[str]:
        """All calls of a reply that is nothing else."""
        if self.format is HERMES:
            more = ' ("\\n" marked)*' if self.parallel else ""
            return [f"calls: marked{more}", f'marked: {self._begin} "\\n" call "\\n" {self._end}']
        separator = "; " if self.format is LLAMA3 else ", "
        calls = "call" + (f' ("{separator}" call)*' if self.parallel else "")
        return [f"calls: {calls}" if self.format is LLAMA3 else f'calls: {self._begin} " [" {calls} "]"']

    def _call(self, *, every: bool) -> list[str]:
        """A call of any of the tools; `every`: also the arguments of those that are not strict fit their schemas."""
        options, rules = [], []
        for number, function in enumerate(self.functions):
            head = f'{{"name": {json.dumps(function["name"])}, "{self.format.arguments_key}": '
            options.append(f'{json.dumps(head)} arguments_{number} "}}"')
            given = function.get("parameters") if every or function.get("strict") else None
            schema = {"type": "object", **(given or {}), "x-guidance": SPACING}
            rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
        return ["call: " + " | ".join(options), *rules]
