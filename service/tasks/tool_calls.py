"""Reads tool calls back from a reply while it is written: a call's arguments go out as they come.

What comes out in all does not depend on how the text was cut. Knows nothing of HTTP or tokens. Pure, but for
the random ids of calls; one parser per reply.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tasks.call_readers import CallPiece, CallReader, NamedReader, ObjectReader, XmlReader
from service.tasks.tools import ToolFormat

Reading = list[str | CallPiece]
"""What a piece of text turned out to be, in its order: content, and parts of calls."""


class ToolCallParser:
    """Tells calls from content while text comes. What only looked like a call is content in the end."""

    def __init__(
        self, format: ToolFormat, *, functions: Sequence[Mapping[str, Any]] = (), max_calls: int | None = None
    ) -> None:
        """`functions` are the tools' definitions: where arguments are written as text, they say what is meant."""
        self.num_calls = 0
        self._format = format
        self._functions = functions
        self._max_calls = max_calls
        self._held = ""
        """Content that may be the beginning of a call, or white space before one."""
        self._call: CallReader | None = None
        self._has_content = False
        self._after_call = False

    @property
    def _marker(self) -> str:
        """What stood before a call and was taken away; bare formats keep it in what they hold."""
        return "" if self._format.bare else self._format.begin

    @property
    def num_held(self) -> int:
        """Characters of which it is not certain yet whether they are content."""
        call = "" if self._call is None or self._call.is_call else self._marker + self._call.text
        return len(self._held) + len(call)

    def feed(self, text: str) -> Reading:
        reading: Reading = []
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
        reading: Reading = []
        if self._call is not None and not self._call.is_call:
            self._content(reading, self._held + self._marker + self._call.text)
        elif self._call is None and (self._held.strip(self._format.between or None) or not self.num_calls):
            self._content(reading, self._held)
        self._held, self._call = "", None
        return reading

    def _reader(self) -> CallReader:
        match self._format.notation:
            case "json":
                return ObjectReader(self.num_calls, self._format)
            case "named":
                return NamedReader(self.num_calls, self._format)
            case "xml":
                return XmlReader(self.num_calls, self._format, functions=self._functions)

    def _content(self, reading: Reading, text: str) -> None:
        if not text:
            return
        self._has_content = True
        if reading and isinstance(reading[-1], str):
            reading[-1] += text
        else:
            reading.append(text)

    def _feed_call(self, reading: Reading, text: str) -> str:
        call = self._call
        assert call is not None
        pieces, rest = call.feed(text)
        if self._max_calls is None or self.num_calls < self._max_calls:
            reading += pieces
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
        """Content up to the marker of a call; after a call its end's marker and white space are dropped."""
        text, self._held = self._held + text, ""
        if self._after_call:
            stripped = text.lstrip()
            if stripped and stripped.startswith(self._format.end):
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
            self._call = self._reader()
            return text[found + len(self._format.begin) :]
        keep = len(text.rstrip())
        start = text.rfind(self._format.begin[0])
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
                self._call = self._reader()
            return stripped
        self._content(reading, text)
        return ""
