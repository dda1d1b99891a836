"""Reads tool calls back from a reply while it is written: a call's arguments go out as they come.

What comes out in all does not depend on how the text was cut. Knows nothing of HTTP or tokens. Pure, but for
the random ids of calls; one parser per reply.
"""

import json
import re
import secrets
from dataclasses import dataclass, field

from service.tasks.tools import ToolFormat

HEADER = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(slots=True)
class CallPiece:
    """A part of call number `index`: its beginning has `id` and `name`, the others text of its arguments (JSON)."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Reading:
    """What a piece of text turned out to be."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def add(self, other: "Reading") -> None:
        self.content += other.content
        self.calls += other.calls


class _CallReader:
    """Reads one `{"name": ..., "arguments": {...}}`, from its first brace; what follows it is left over."""

    def __init__(self, index: int, format: ToolFormat) -> None:
        self.text = ""
        self.is_complete = False
        self.is_call = False
        self._index = index
        self._format = format
        self._read = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._arguments_start: int | None = None
        self._arguments_end: int | None = None
        self._given = 0

    def feed(self, text: str) -> tuple[list[CallPiece], str]:
        """Returns the pieces that are certain now, and the text behind the call once it is complete."""
        self.text += text
        pieces: list[CallPiece] = []
        if self._arguments_start is None and (header := HEADER.match(self.text)):
            pieces.append(self._begin(json.loads(header[1])))
            self._arguments_start = self._given = header.end()
        self._scan()
        if self._arguments_start is not None:
            end = self._arguments_end if self._arguments_end is not None else self._read
            if end > self._given:
                pieces.append(CallPiece(self._index, self.text[self._given : end]))
                self._given = end
        rest = ""
        if self.is_complete:
            self.text, rest = self.text[: self._read], self.text[self._read :]
            if self._arguments_start is None:
                pieces += self._whole()
        return pieces, rest

    def _begin(self, name: str) -> CallPiece:
        self.is_call = True
        length = self._format.id_length
        return CallPiece(self._index, id=self._format.id_prefix + secrets.token_hex(length)[:length], name=name)

    def _scan(self) -> None:
        """Follows braces and strings from where it stopped; worked example: {"a": {"b": "}"}} has depths 1 and 2."""
        for position in range(self._read, len(self.text)):
            character = self.text[position]
            self._read = position + 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                begun = self._arguments_start is not None and position >= self._arguments_start
                if self._depth == 1 and begun and self._arguments_end is None:
                    self._arguments_end = position + 1
                if self._depth == 0:
                    self.is_complete = True
                    return
            elif character == "<":  # no JSON: the end marker came before the last brace
                self.is_complete, self._read = True, position
                return

    def _whole(self) -> list[CallPiece]:
        """A call in another order or shape, read once it is complete; nothing if it is no call at all."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return []
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return []
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            text = arguments
        elif isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False)
        else:
            return []
        return [self._begin(value["name"]), CallPiece(self._index, text)]


class ToolCallParser:
    """Tells calls from content while text comes. What only looked like a call is content in the end."""

    def __init__(self, format: ToolFormat, *, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._format = format
        self._max_calls = max_calls
        self._held = ""
        """Content that may be the beginning of a call, or white space before one."""
        self._call: _CallReader | None = None
        self._has_content = False
        self._after_call = False

    @property
    def _marker(self) -> str:
        """What stood before a call and was taken away; bare formats keep it in what they hold."""
        return "" if self._format.bare else self._format.begin

    def feed(self, text: str) -> Reading:
        reading = Reading()
        while text:
            if self._call is not None:
                text = self._feed_call(reading, text)
            elif self._format.bare:
                text = self._look_for_object(reading, text)
            else:
                text = self._look_for_marker(reading, text)
        return reading

    def finish(self) -> Reading:
        """The rest, now that the text has ended; a call that broke off before its name was known is content."""
        reading = Reading()
        if self._call is not None and not self._call.is_call:
            self._content(reading, self._held + self._marker + self._call.text)
        elif self._call is None and (self._held.strip(self._format.between or None) or not self.num_calls):
            self._content(reading, self._held)
        self._held, self._call = "", None
        return reading

    def _content(self, reading: Reading, text: str) -> None:
        self._has_content = self._has_content or bool(text)
        reading.content += text

    def _feed_call(self, reading: Reading, text: str) -> str:
        call = self._call
        assert call is not None
        if not call.text:  # white space between the marker and the first brace
            text = text.lstrip()
            if not text:
                return ""
        if not call.text and text[0] != "{":
            self._call, held, self._held = None, self._held, ""
            self._content(reading, held + self._marker)
            return text
        pieces, rest = call.feed(text)
        if self._max_calls is None or self.num_calls < self._max_calls:
            reading.calls += pieces
        if call.is_call:
            self._held = ""
        if not call.is_complete:
            return ""
        self._call = None
        if call.is_call:
            self.num_calls += 1
            self._after_call = True
        else:
            self._content(reading, self._held + self._marker + call.text)
            self._held = ""
        return rest

    def _look_for_marker(self, reading: Reading, text: str) -> str:
        """Hermes: content up to `<tool_call>`; after a call its `</tool_call>` and white space are dropped."""
        text, self._held = self._held + text, ""
        if self._after_call:
            stripped = text.lstrip()
            if stripped.startswith(self._format.end):
                text, self._after_call = stripped[len(self._format.end) :], False
            elif self._format.end.startswith(stripped):
                self._held = text
                return ""
            else:
                self._after_call = False
        found = text.find(self._format.begin)
        if found >= 0:
            before = text[:found]
            self._content(reading, before[: len(before.rstrip())])
            self._held = before[len(before.rstrip()) :]
            self._call = _CallReader(self.num_calls, self._format)
            return text[found + len(self._format.begin) :]
        keep = len(text.rstrip())
        start = text.rfind("<")
        if start >= 0 and self._format.begin.startswith(text[start:]):
            keep = len(text[:start].rstrip())
        self._content(reading, text[:keep])
        self._held = text[keep:]
        return ""

    def _look_for_object(self, reading: Reading, text: str) -> str:
        """Bare objects: a reply is calls, one after the other, or it is content."""
        if self._has_content:
            self._content(reading, text)
            return ""
        text, self._held = self._held + text, ""
        format, stripped = self._format, text.lstrip()
        if format.begin.startswith(stripped) and not self.num_calls:
            self._held = text
            return ""
        is_marked = stripped.startswith(format.begin) or self.num_calls > 0
        stripped = stripped.removeprefix(format.begin).lstrip(format.between if self.num_calls else format.lead)
        if (is_marked or not format.begin_required) and stripped[:1] in ("", "{"):
            self._held = text[: len(text) - len(stripped)]
            if stripped:
                self._call = _CallReader(self.num_calls, format)
            return stripped
        self._content(reading, text)
        return ""
