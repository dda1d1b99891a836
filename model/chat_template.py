"""Messages to the prompt text that a chat checkpoint was trained on, as `transformers`' `apply_chat_template` makes it.

The template is the checkpoint's own (chat_template.jinja, chat_template.json or tokenizer_config.json) and runs in a
sandbox with a limit on time and size. Knows nothing of HTTP or token ids. Runs in the API process, best in a thread.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from model.errors import CheckpointError
from model.template_sandbox import BudgetExceededError, Sandbox, TemplateRaisedError, budget
from model.tokenizer import load_tokenizer_config

MAX_SECONDS = 2.0
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

SYSTEM_PROBE = "SYSTEM_MESSAGE"
FIRST_QUESTION = {"role": "user", "content": "Hello"}

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """These messages do not make a prompt; the message says why, for the caller."""


class ChatTemplate:
    """One checkpoint's templates: `default`, and others by name where it has them (`tool_use`)."""

    def __init__(self, templates: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises: CheckpointError if a template is not valid jinja."""
        self.sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._sandbox = Sandbox()
        self._compiled = {name: self._compile(name, source) for name, source in self.sources.items()}
        self.variables = frozenset().union(*(self._variables(source) for source in self.sources.values()))
        """Names that the templates read and do not set."""
        self.supports_tools = "tool_use" in self.sources or "tools" in self.variables

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is put into the prompt, not refused and not dropped."""
        try:
            return SYSTEM_PROBE in self.render([{"role": "system", "content": SYSTEM_PROBE}, FIRST_QUESTION])
        except ChatTemplateError:
            return False

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """The checkpoint's template, or None where it has none."""
        config = load_tokenizer_config(folder)
        templates = config.chat_template
        if (path := folder / "chat_template.json").is_file():
            templates = _read_json_template(path)
        if (path := folder / "chat_template.jinja").is_file():
            named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
            templates = {"default": path.read_text(encoding="utf-8")}
            templates |= {extra.stem: extra.read_text(encoding="utf-8") for extra in named}
        return None if not templates else cls(templates, config.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> str:
        """The prompt's text, special tokens included (so it is encoded without adding any).

        `variables` are what a template may ask for beyond the standard (`enable_thinking`).

        Raises:
            ChatTemplateError: the template refuses the messages, fails on them, or exceeds its limits.
        """
        name = self._choose(with_tools=tools is not None)
        chat = [_prepared(message) for message in messages]
        final = _mark_final(chat, self.sources[name]) if continue_final_message else None
        names: dict[str, Any] = {
            **self._special_tokens,
            **{key: value for key, value in (variables or {}).items() if key not in RESERVED_VARIABLES},
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = _run(self._compiled[name], names, max_seconds)
        return text if final is None else _cut_after_final(text, final)

    def _choose(self, *, with_tools: bool) -> str:
        if with_tools and "tool_use" in self.sources:
            return "tool_use"
        if "default" not in self.sources:
            raise ChatTemplateError(f"the checkpoint has no default chat template, only: {', '.join(self.sources)}")
        return "default"

    def _compile(self, name: str, source: str) -> jinja2.Template:
        try:
            return self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template '{name}' is not valid: {error.message} (line {error.lineno})"
            raise CheckpointError(message, file="chat template") from error

    def _variables(self, source: str) -> set[str]:
        return meta.find_undeclared_variables(self._sandbox.parse(source))


def _run(template: jinja2.Template, names: Mapping[str, Any], max_seconds: float) -> str:
    try:
        with budget(max_seconds):
            return template.render(names)
    except (TemplateRaisedError, BudgetExceededError) as error:
        raise ChatTemplateError(str(error)) from error
    except RecursionError as error:
        raise ChatTemplateError("the chat template recurses too deeply") from error
    except Exception as error:  # a template can raise whatever an expression in it can
        raise ChatTemplateError(f"the chat template cannot be applied to these messages: {error}") from error


def _prepared(message: Message) -> dict[str, Any]:
    """Null fields dropped (templates would print "None"), reasoning under each of the names that templates read."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in REASONING_FIELDS if key in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _mark_final(chat: list[dict[str, Any]], source: str) -> str:
    """Appends a tag to the last message's text, so that the rendering can be cut there. Returns that text."""
    content = chat[-1].get("content") if chat else None
    if content is None or "content" not in source:
        raise ChatTemplateError("continue_final_message needs a final message with content to continue")
    if isinstance(content, str):
        chat[-1]["content"] = content + CONTINUE_TAG
        return content
    blocks = [dict(block) for block in content]
    chat[-1]["content"] = blocks
    for block in reversed(blocks):
        if isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + CONTINUE_TAG
            return text
    raise ChatTemplateError("continue_final_message needs a text in the final message to continue")


def _cut_after_final(text: str, final: str) -> str:
    position = text.rfind(CONTINUE_TAG.strip())
    if position < 0 or final.strip() not in text:
        raise ChatTemplateError("continue_final_message: the chat template does not keep the final message as it is")
    kept = text[:position]
    # Without the tag's own trailing space the template has stripped the message, and its end is where the text ends.
    return kept if text[position:].startswith(CONTINUE_TAG) else kept.rstrip()


def _read_json_template(path: Path) -> str | dict[str, str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} has no chat template: {error}", file=path.name) from error
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    return str(value)
