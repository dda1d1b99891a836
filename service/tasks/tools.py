"""Tool calls in a checkpoint's own words: which format it speaks.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`; Qwen3-Coder:
`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`; Llama 3:
`{"name": ..., "parameters": ...}`; Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": ...}]`, since its version 11
`[TOOL_CALLS]NAME[ARGS]{...}`. Knows nothing of HTTP or tokens. Pure.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """`begin` and `end` stand around each call, or (with `bare`) objects follow each other after `begin`."""

    name: Literal["hermes", "qwen3-coder", "llama3", "mistral", "mistral-11"]
    begin: str
    end: str = ""
    notation: Literal["json", "xml", "named"] = "json"
    """How a call itself is written: as one object, in XML's manner, or as a name and its arguments' object."""
    padding: str = ""
    """Between the markers and the call, and between calls."""
    inner: tuple[str, ...] = ()
    """Markers within a call."""
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
        return tuple(marker for marker in (self.begin, self.end, *self.inner) if marker)


ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"

HERMES = ToolFormat(name="hermes", begin="<tool_call>", end="</tool_call>", padding="\n")
QWEN3_CODER = ToolFormat(name="qwen3-coder", begin="<tool_call>", end="</tool_call>", notation="xml", padding="\n")
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
MISTRAL_11 = ToolFormat(
    name="mistral-11",
    begin="[TOOL_CALLS]",
    notation="named",
    inner=(ARGUMENTS, CALL_ID),
    id_length=9,
    id_prefix="",
)


def format_of(template_source: str) -> ToolFormat:
    """The format that a chat template asks the model for; Hermes where it does not say."""
    if HERMES.begin in template_source:
        return QWEN3_CODER if "<function=" in template_source else HERMES
    if MISTRAL.begin in template_source:
        return MISTRAL_11 if ARGUMENTS in template_source else MISTRAL
    return LLAMA3 if LLAMA3.begin in template_source or "ipython" in template_source else HERMES
