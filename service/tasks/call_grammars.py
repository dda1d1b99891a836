"""Grammars of replies that call tools: that must, that may instead of answering in JSON, that may in the midst of text.

Lark, as llguidance takes it. The arguments of each tool are a schema of their own, so that references within it
(`#/$defs/...`, as pydantic writes them) are found. Knows nothing of HTTP or tokens. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.grammar_check import WHITESPACE
from service.tasks import xml_parameters
from service.tasks.grammars import SPACING, lark_marker, up_to
from service.tasks.tools import ARGUMENTS, CALL_ID, LLAMA3, ToolFormat

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
        format, call = self.format, self._call(every=False)
        if format is LLAMA3:
            start = f"start: calls | {self._begin} calls | NO_OBJECT"
            return "\n".join((start, NO_OBJECT, *self._calls(), *call))
        many = "*" if self.parallel and not format.bare else "?"
        more = ' (", " call)*' if self.parallel else ""
        padding = f"{json.dumps(format.padding)}?" if format.padding else ""
        body = f'" "? "[" call{more} "]"' if format.bare else f"{padding} call {padding} {self._end}"
        opening = up_to("opening", format.begin, self.token_ids)
        return "\n".join((f"start: (opening {body}){many} TEXT", *opening, *call))

    @property
    def _begin(self) -> str:
        return lark_marker(self.format.begin, self.token_ids)

    @property
    def _end(self) -> str:
        return lark_marker(self.format.end, self.token_ids) if self.format.end else ""

    def _calls(self) -> list[str]:
        """All calls of a reply that is nothing else."""
        if not self.format.bare:
            padding = json.dumps(self.format.padding) if self.format.padding else ""
            more = f" ({padding} marked)*" if self.parallel else ""
            return [f"calls: marked{more}", f"marked: {self._begin} {padding} call {padding} {self._end}"]
        separator = "; " if self.format is LLAMA3 else ", "
        calls = "call" + (f' ("{separator}" call)*' if self.parallel else "")
        return [f"calls: {calls}" if self.format is LLAMA3 else f'calls: {self._begin} " "? "[" {calls} "]"']

    def _call(self, *, every: bool) -> list[str]:
        """A call of any of the tools; `every`: also the arguments of those that are not strict fit their schemas."""
        options, rules = [], []
        for number, function in enumerate(self.functions):
            name = f"arguments_{number}"
            options.append(self._written(function["name"], name))
            given = function.get("parameters") if every or function.get("strict") else None
            if self.format.notation == "xml":
                rules += xml_parameters.rules(name, given or {})
            else:
                schema = {"type": "object", **(given or {}), "x-guidance": SPACING}
                rules.append(f"{name}: %json {json.dumps(schema)}")
        if self.format.notation == "xml":
            rules += xml_parameters.ANY_PARAMETER
        return ["call: " + " | ".join(options), *rules]

    def _written(self, name: str, arguments: str) -> str:
        """One tool's call, in which `arguments` is a rule."""
        if self.format.notation == "xml":
            opening = json.dumps(f"<function={name}>\n")
            return f'{opening} {arguments} "</function>"'
        if self.format.notation == "named":
            id_marker, marker = (lark_marker(text, self.token_ids) for text in (CALL_ID, ARGUMENTS))
            return f"{json.dumps(name)} ({id_marker} /[a-zA-Z0-9]{{9}}/)? {marker} {arguments}"
        head = f'{{"name": {json.dumps(name)}, "{self.format.arguments_key}": '
        return f'{json.dumps(head)} {arguments} "}}"'
