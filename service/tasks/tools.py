"""Tool calls in a checkpoint's own words: which format it speaks.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`; Llama 3: `{"name": ..., "parameters": ...}`;
Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": ...}]`. Knows nothing of HTTP or tokens. Pure.
"""

from dataclasses import dataclass
from typing import Literal


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
