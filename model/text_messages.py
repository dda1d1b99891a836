"""Texts and pairs as the messages of a chat, where a sentence-transformers folder was trained to read them so.

Its `sentence_bert_config.json` has a "message" in `modality_config` (since sentence-transformers 5.4): a text is then a
user's message, a pair has the roles "query" and "document", a prompt is the system's. Says what the messages are and
whether a chat template has a place for them; the template itself is `model.chat_template`'s. API process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.architectures.raw import RawConfig
from model.chat_template import ChatTemplate, ChatTemplateError, Message
from model.errors import CheckpointError, UnsupportedArchitectureError

Text = str | tuple[str, str]

HARMLESS = frozenset({"padding", "padding_side", "pad_to_multiple_of", "truncation", "return_tensors"})
"""Arguments of a tokenizer that do not change what ids one text has."""
NOT_VARIABLES = frozenset({"tools", "documents", "continue_final_message", "chat_template", "max_length"})
PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFormat:
    """How a text becomes messages, and what else the template is told."""

    structured: bool
    """Contents are lists of parts with a type; else plain strings."""
    add_generation_prompt: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    keeps_suffix: bool = True
    """Whether what a template writes behind a text is kept when the text is cut."""

    def messages(self, text: Text, prompt: str) -> list[Message]:
        """The conversation that stands for a text or a pair; no prompt is no system message."""
        turns = [("user", text)] if isinstance(text, str) else [("query", text[0]), ("document", text[1])]
        turns = [("system", prompt), *turns] if prompt else turns
        return [{"role": role, "content": self._content(content)} for role, content in turns]

    def render(self, template: ChatTemplate, text: Text, prompt: str) -> str:
        """The text that the network reads, special tokens included. Raises ChatTemplateError."""
        return template.render(
            self.messages(text, prompt), add_generation_prompt=self.add_generation_prompt, variables=self.variables
        )

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.structured else text


def read_message_format(transformer: RawConfig) -> MessageFormat | None:
    """What `sentence_bert_config.json` says about messages; None where texts are read as they are.

    Raises: UnsupportedArchitectureError for settings that would change the ids and that we do not follow.
    """
    for key in ("query_expansion", "query_length", "document_length"):
        if key in transformer:
            raise _unsupported(transformer, key)
    modalities = transformer.section("modality_config") if "modality_config" in transformer else None
    if modalities is None or "message" not in modalities:
        return None
    if transformer.flag("do_lower_case", False):
        raise _unsupported(transformer, "do_lower_case")
    given = transformer.section("processing_kwargs") if "processing_kwargs" in transformer else RawConfig({})
    for key in ("common", "text"):
        extra = set(given.section(key)) - HARMLESS if key in given else ()
        if extra:
            raise _unsupported(transformer, "processing_kwargs")
    variables = dict(given.section("chat_template").values) if "chat_template" in given else {}
    if NOT_VARIABLES & variables.keys():
        raise _unsupported(transformer, "processing_kwargs")
    form = modalities.section("message").choice("format", {"structured": True, "flat": False})
    return MessageFormat(
        structured=form,
        add_generation_prompt=bool(variables.pop("add_generation_prompt", False)),
        keeps_suffix=bool(variables.pop("restore_suffix", True)),
        variables={key: value for key, value in variables.items() if key not in HARMLESS},
    )


def check_template(format: MessageFormat, template: ChatTemplate | None, *, pairs: bool) -> None:
    """Sees that the template writes what it is given: one that only knows users and assistants drops a pair.

    Raises: CheckpointError.
    """
    if template is None:
        raise CheckpointError("sentence_bert_config.json asks for messages, and there is no chat template")
    if "task" in template.variables:
        raise UnsupportedArchitectureError("the chat template reads 'task', which is not supported for texts")
    probes: list[Text] = [*PROBES] if pairs else ["alpha", "charlie"]
    try:
        rendered = {format.render(template, probe, "") for probe in probes}
    except ChatTemplateError as error:
        raise CheckpointError(f"the chat template cannot be applied to texts: {error}") from error
    if len(rendered) < len(probes):
        roles = "the roles 'query' and 'document'" if pairs else "what a user says"
        raise CheckpointError(f"the chat template does not write {roles}, which sentence_bert_config.json asks for")


def _unsupported(transformer: RawConfig, key: str) -> UnsupportedArchitectureError:
    value = str(transformer.values[key])[:80]
    return UnsupportedArchitectureError(f"{transformer.file}: {key} {value} is not supported", file=transformer.file)
