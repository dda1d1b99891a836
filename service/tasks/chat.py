"""A conversation as a prompt: messages in the template's terms, tools in the checkpoint's format, ids at the end.

Works on plain dictionaries in OpenAI's shape, already validated. Knows neither HTTP nor sampling. Templates and long
texts run in a thread. API process only.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.batch import Grammar
from model.chat_template import REASONING_FIELDS, RESERVED_VARIABLES, ChatTemplate, ChatTemplateError
from model.tokenizer import TokenizerError
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, TaskNotSupported, UnsupportedParameter
from service.tasks.call_grammars import CallGrammar
from service.tasks.reasoning import Thoughts, thoughts_after
from service.tasks.told_tools import in_words
from service.tasks.tools import HERMES, ToolFormat, format_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`tools` are OpenAI's; where none may be called there are none. Templates that know no tools are told in words."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None

    @property
    def continued(self) -> str | None:
        """The text that the reply goes on with, if it is no message of its own."""
        return _text(self.messages[-1].get("content") or "") if self.continue_final_message else None


async def chat_prompt(model: LoadedModel, conversation: Conversation) -> list[int]:
    """The ids of the prompt, special tokens as the template writes them.

    Raises: InvalidRequest where the messages do not fit each other or the template, TaskNotSupported,
    UnsupportedParameter where the template does not read what it would be told.
    """
    template = _template(model)
    _check_readable(model, template, conversation)
    variables = _variables(model, template, conversation)
    messages = [_for_template(message, f"messages.{n}") for n, message in enumerate(conversation.messages)]

    def make() -> list[int]:
        told, tools = messages, conversation.tools
        if not template.supports_tools:
            told, tools = in_words(messages, tools, takes_system=template.takes_system), ()
        text = template.render(
            told,
            tools=list(tools) or None,
            documents=conversation.documents,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            variables=variables,
        )
        return model.tokenizer.encode(text, add_special_tokens=False)

    try:
        return await asyncio.to_thread(make)
    except ChatTemplateError as error:
        raise InvalidRequest(str(error), param="messages") from error
    except TokenizerError as error:
        raise InvalidRequest(f"messages: {error}", param="messages") from error


def thoughts_of(model: LoadedModel, conversation: Conversation, prompt_ids: Sequence[int]) -> Thoughts:
    """What the reply to the conversation's prompt begins with."""
    variables = _variables(model, _template(model), conversation)
    return thoughts_after(model, prompt_ids, variables=variables, continued=conversation.continued)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How a reply may call tools: which ones in which words, whether it must, at most how many."""

    calls: CallGrammar
    is_required: bool
    max_calls: int | None
    keep_special: frozenset[int]
    """The format's markers, where the tokenizer may hold them for special: they are needed to read the reply."""

    @property
    def format(self) -> ToolFormat:
        return self.calls.format

    def grammar(self, wanted: Grammar | None) -> Grammar | None:
        """What the reply must be, if its text must be `wanted`. None: whatever the model writes.

        Raises: InvalidRequest where both cannot be had.
        """
        if self.is_required:
            if wanted is not None:
                message = "a required tool call and a constrained text exclude each other"
                raise InvalidRequest(message, param="tool_choice")
            return Grammar("lark", self.calls.required())
        if wanted is None:
            return Grammar("lark", self.calls.or_text()) if self.calls.is_strict else None
        if wanted.kind not in ("json_object", "json_schema"):
            message = "tools and a text that is held to a grammar exclude each other (tool_choice none calls none)"
            raise InvalidRequest(message, param="tools")
        schema = json.loads(wanted.text) if wanted.kind == "json_schema" else {"type": "object"}
        return Grammar("lark", self.calls.or_json(schema))


def tool_use(
    model: LoadedModel, tools: Sequence[Mapping[str, Any]], *, choice: str, name: str | None, parallel: bool
) -> ToolUse | None:
    """None where no tool may be called. `choice` is "none", "auto", "required" or "named" (then `name` says which).

    Raises: InvalidRequest where the tools and the choice do not fit.
    """
    names = [tool["function"]["name"] for tool in tools]
    for position, tool_name in enumerate(names):
        if tool_name in names[:position]:
            raise InvalidRequest(f"two tools are named '{tool_name}'", param=f"tools.{position}.function.name")
    if choice in ("required", "named") and not tools:
        raise InvalidRequest("tool_choice asks for a tool and there are no tools", param="tool_choice")
    if name is not None and name not in names:
        raise InvalidRequest(f"tool_choice names '{name}'; the tools are: {', '.join(names)}", param="tool_choice")
    if choice == "none" or not tools:
        return None
    template = _template(model)
    format = format_of("".join(template.sources.values())) if template.supports_tools else HERMES
    token_ids = model.tokenizer.added_among(format.markers)
    parallel = parallel and name is None
    functions = [tool["function"] for tool in tools if name is None or tool["function"]["name"] == name]
    calls = CallGrammar(format=format, functions=functions, parallel=parallel, token_ids=token_ids)
    return ToolUse(calls, choice != "auto", None if parallel else 1, frozenset(token_ids.values()))


def _template(model: LoadedModel) -> ChatTemplate:
    if model.chat_template is None:
        raise TaskNotSupported(f"model '{model.name}' has no chat template: use /v1/completions", param="model")
    return model.chat_template


def without_thinking(model: LoadedModel) -> dict[str, Any]:
    """What tells a template that an answer is wanted and no thoughts, where it can be told."""
    return {"enable_thinking": False} if "enable_thinking" in _template(model).variables else {}


def _check_readable(model: LoadedModel, template: ChatTemplate, conversation: Conversation) -> None:
    """A template drops without a word what it does not read."""
    if conversation.documents and "documents" not in template.variables:
        raise UnsupportedParameter(f"the chat template of {model.name} reads no documents", param="documents")
    for name in conversation.template_variables:
        param = f"chat_template_kwargs.{name}"
        if name in RESERVED_VARIABLES:
            raise InvalidRequest(f"{param}: give {name} as a field of the request", param=param)
        if name not in template.variables:
            raise UnsupportedParameter(f"{param}: the chat template of {model.name} does not read it", param=param)


def _variables(model: LoadedModel, template: ChatTemplate, conversation: Conversation) -> dict[str, Any]:
    return {**conversation.template_variables, **_effort(model, template, conversation.reasoning_effort)}


def _effort(model: LoadedModel, template: ChatTemplate, effort: str | None) -> dict[str, Any]:
    """How much to think, in the words of the checkpoint's template."""
    if effort is None:
        return {}
    if "reasoning_effort" in template.variables:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template.variables:
        return {"enable_thinking": effort != "none"}
    message = f"reasoning_effort: the chat template of {model.name} does not let thinking be turned up or off"
    raise UnsupportedParameter(message, param="reasoning_effort")


def _for_template(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """OpenAI's message as templates expect it: one text, arguments as objects, `system` for `developer`."""
    role, content = message["role"], message.get("content")
    calls = message.get("tool_calls") or []
    if content is None and role == "assistant" and any(message.get(name) for name in REASONING_FIELDS):
        content = ""  # interrupted while it thought
    if content is None and not (role == "assistant" and calls):
        raise InvalidRequest(f"{place}: a message of role '{role}' needs content", param=f"{place}.content")
    if role == "tool" and message.get("tool_call_id") is None:
        raise InvalidRequest(f"{place}: which call is this the result of?", param=f"{place}.tool_call_id")
    if calls and role != "assistant":
        raise InvalidRequest(f"{place}: only an assistant calls tools", param=f"{place}.tool_calls")
    found = {key: value for key, value in message.items() if key != "tool_calls"}
    found["role"] = "system" if role == "developer" else role
    if content is not None:
        found["content"] = _text(content)
    if calls:
        found["tool_calls"] = [_call(call, f"{place}.tool_calls.{n}") for n, call in enumerate(calls)]
    return found


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        param = f"{place}.function.arguments"
        raise InvalidRequest(f"{param}: not JSON: {error}", param=param) from error
    if not isinstance(arguments, dict):
        param = f"{place}.function.arguments"
        raise InvalidRequest(f"{param}: not a JSON object", param=param)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}
