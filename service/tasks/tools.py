"""Tool calls in a checkpoint's own words: which format it speaks, and the grammar that makes it call.

Two formats: Hermes and Qwen (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`), and Llama 3's JSON
(`{"name": ..., "parameters": {...}}`). Knows nothing of HTTP or tokens. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As both formats' examples are written; free white space is where weak models get lost."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    name: Literal["hermes", "llama3"]
    begin: str
    end: str
    arguments_key: str
    markers: tuple[str, ...]
    """Tokens that the format is made of: shown to the reader even where the tokenizer calls them special."""


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments", ("<tool_call>", "</tool_call>"))
LLAMA3 = ToolFormat("llama3", "", "", "parameters", ("<|python_tag|>",))


def format_of(template_source: str) -> ToolFormat:
    """The format that a chat template asks the model for; Hermes where it does not say."""
    if HERMES.begin not in template_source and ("<|python_tag|>" in template_source or "ipython" in template_source):
        return LLAMA3
    return HERMES


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names` are the tools that may be called; `required` says that one of them must be."""

    names: tuple[str, ...]
    required: bool


def call_grammar(
    format: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    *,
    parallel: bool,
    special_markers: frozenset[str] = frozenset(),
) -> str:
    """A Lark grammar whose texts are calls of the chosen tools, with arguments that fit their schemas.

    `special_markers` are those that are tokens of their own and not text: llguidance writes them without quotes.
    """
    options = [_call_schema(format, tool["function"]) for tool in tools if tool["function"]["name"] in choice.names]
    schema = options[0] if len(options) == 1 else {"anyOf": options}
    body = "%json " + json.dumps({"x-guidance": SPACING, **schema})
    if format is LLAMA3:
        more = ' ("; " call)*' if parallel else ""
        return f"start: call{more}\ncall: body\nbody: {body}"
    begin, end = (
        f'{marker} "{before}"' if marker in special_markers else f'"{marker}{before}"'
        for marker, before in ((format.begin, "\\n"), (format.end, ""))
    )
    more = ' ("\\n" call)*' if parallel else ""
    return f'start: call{more}\ncall: {begin} body "\\n" {end}\nbody: {body}'


def _call_schema(format: ToolFormat, function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, format.arguments_key: parameters},
        "required": ["name", format.arguments_key],
        "additionalProperties": False,
    }
