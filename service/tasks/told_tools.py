"""Tools for chat templates that know none: told in words of ours, called and answered in text, in the Hermes format.

Many chat checkpoints can follow such a text, and a grammar sees to it where a call is required. Works on messages in
the templates' terms, as `chat` makes them. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.tasks.tools import HERMES

Message = dict[str, Any]

INSTRUCTIONS = """You can call tools. Each line describes one: its name, what it does, the JSON schema of its arguments.
{tools}

To call a tool, write a block like this one, and one block for each call:
{example}
You are then given each result between {begin} and {end}. Where no tool is needed, answer without any."""
RESULT_BEGIN, RESULT_END = "<tool_response>", "</tool_response>"


def in_words(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, takes_system: bool) -> list[Message]:
    """The same conversation in plain messages: its calls and their results as text, and the tools told before it.

    `takes_system`: whether the template has a place for a system message; without one the first user's is it.
    """
    plain = _plain_messages(messages)
    if not tools:
        return plain
    text = _instructions(tools)
    role = "system" if takes_system else "user"
    place = next((place for place, message in enumerate(plain) if message["role"] == role), None)
    if place is None:
        return [{"role": role, "content": text}, *plain]
    own = plain[place]["content"]
    both = f"{own}\n\n{text}" if takes_system else f"{text}\n\n{own}"
    return [*plain[:place], {**plain[place], "content": both}, *plain[place + 1 :]]


def _instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    keys = ("name", "description", "parameters")
    functions = [{key: tool["function"][key] for key in keys if key in tool["function"]} for tool in tools]
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    example = _call("the tool's name", {"an argument": "its value"})
    return INSTRUCTIONS.format(tools=lines, example=example, begin=RESULT_BEGIN, end=RESULT_END)


def _plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Results in a row, and what the user says to them, are one message: many templates want the roles in turn."""
    found: list[Message] = []
    after_result = False
    for message in messages:
        plain = _plain(message)
        if after_result and plain["role"] == "user":
            plain = {**plain, "content": f"{found.pop()['content']}\n{plain['content']}"}
        found.append(plain)
        after_result = message["role"] == "tool"
    return found


def _plain(message: Message) -> Message:
    """A call and a result as text; a result is told by the user, as templates know no one else."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"{RESULT_BEGIN}\n{message['content']}\n{RESULT_END}"}
    calls = [call["function"] for call in message.get("tool_calls", [])]
    if not calls:
        return message
    texts = [message.get("content") or "", *(_call(call["name"], call["arguments"]) for call in calls)]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(text for text in texts if text)}


def _call(name: str, arguments: Any) -> str:
    call = json.dumps({"name": name, HERMES.arguments_key: arguments}, ensure_ascii=False)
    return f"{HERMES.begin}\n{call}\n{HERMES.end}"
