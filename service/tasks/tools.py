"""Tool calls in a checkpoint's own words: which format it speaks, and the grammar that makes it call.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`; Llama 3: `{"name": ..., "parameters": ...}`;
Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": ...}]`. Knows nothing of HTTP or tokens. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As the formats' examples are written; free white space is where weak models get lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """`begin` and `end` stand around each call, or (with `bare`) objects follow each other after `begin`."""

    name: Literal["hermes", "llama3", "mistral"]
    begin: str
    end: str = ""
    arguments_key: str = "arguments"
    bare: bool = False
    begin_required: bool = True
    lead: str = ""
    """Bare objects: characters that may stand before the first one."""
    between: str = ""
    """Bare objects: characters that may stand between them, and after the last."""
    id_length: int = 24
    id_prefix: str = "call_"

    @property
    def markers(self) -> tuple[str, ...]:
        """Tokens that the format is made of: shown to the reader even where the tokenizer calls them special."""
        return tuple(marker for marker in (self.begin, self.end) if marker)


HERMES = ToolFormat(name="hermes", begin="<tool_call>", end="</tool_call>")
LLAMA3 = ToolFormat(
    name="llama3",
    begin="<|python_tag|>",
    arguments_key="parameters",
    bare=True,
    begin_required=False,
    lead=" \n\t",
    between="; \n\t",
)
MISTRAL = ToolFormat(
    name="mistral",
    begin="[TOOL_CALLS]",
    bare=True,
    lead=" \n\t[",
    between=", \n\t]",
    id_length=9,  # its templates refuse any other
    id_prefix="",
)


def format_of(template_source: str) -> ToolFormat:
    """The format that a chat template asks the model for; Hermes where it does not say."""
    if HERMES.begin in template_source:
        return HERMES
    if MISTRAL.begin in template_source:
        return MISTRAL
    return LLAMA3 if LLAMA3.begin in template_source or "ipython" in template_source else HERMES


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
    special_ids: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """A Lark grammar whose texts are calls of the chosen tools, with arguments that fit their schemas.

    `special_ids` are the markers that are tokens of their own and no text: a grammar names them by id.
    """
    options = [_call_schema(format, tool["function"]) for tool in tools if tool["function"]["name"] in choice.names]
    schema = options[0] if len(options) == 1 else {"anyOf": options}
    body = "%json " + json.dumps({"x-guidance": SPACING, **schema})
    begin, end = (
        f"<[{special_ids[marker]}]>" if marker in special_ids else f'"{marker}"'
        for marker in (format.begin, format.end)
    )
    if format is MISTRAL:
        more = ' (", " call)*' if parallel else ""
        return f'start: {begin} " [" call{more} "]"\ncall: {body}'
    if format is LLAMA3:
        more = ' ("; " call)*' if parallel else ""
        return f"start: call{more}\ncall: {body}"
    more = ' ("\\n" call)*' if parallel else ""
    return f'start: call{more}\ncall: {begin} "\\n" body "\\n" {end}\nbody: {body}'


def _call_schema(format: ToolFormat, function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, format.arguments_key: parameters},
        "required": ["name", format.arguments_key],
        "additionalProperties": False,
    }
