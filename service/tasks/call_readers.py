"""Reads one tool call from its beginning to its end, in each of the notations, while it is written.

A reader is fed text until `is_complete`; what follows the call is handed back. Where the text turns out to be no call
at all, `is_call` stays false and `text` is what has been taken. Knows nothing of HTTP or tokens. Pure, but for the
random ids of calls; one reader per call.
"""

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.tasks.tools import ARGUMENTS, CALL_ID, ToolFormat
from service.tasks.xml_parameters import parameter, typed, types_of

OBJECT_HEADER = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)',
)
NAMED_HEADER = re.compile(rf"\s*([\w.-]+)(?:{re.escape(CALL_ID)}\w*)?(?:{re.escape(ARGUMENTS)})?\s*(?=\{{)")
NAMED_HEADER_BEGUN = re.compile(r"\s*[\w.-]*(?:\[[\w\[\]]*)?\s*")
FUNCTION_HEADER = re.compile(r"\s*<function=([^>\s]+)>")
PARAMETER_HEADER = re.compile(r"<parameter=([^>]+)>\n?")
FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END = "<function=", "</function>", "<parameter=", "</parameter>"


@dataclass(slots=True)
class CallPiece:
    """A part of call number `index`: its beginning has `id` and `name`, the others text of its arguments (JSON)."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class _Nesting:
    """How deep the brackets of JSON are nested at a place, outside of its strings."""

    depth: int = 0
    in_string: bool = False
    _escaped: bool = False

    def take(self, character: str) -> bool:
        """Whether the character closes a bracket. Worked example: {"a": {"b": "}"}} has depths 1 and 2."""
        if self._escaped:
            self._escaped = False
        elif self.in_string:
            self._escaped = character == "\\"
            self.in_string = character != '"'
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            return True
        return False


@dataclass(slots=True)
class CallReader(ABC):
    """What the readers share; each has its own `feed`."""

    index: int
    format: ToolFormat
    text: str = ""
    is_complete: bool = False
    is_call: bool = False

    @abstractmethod
    def feed(self, text: str) -> tuple[list[CallPiece], str]:
        """Returns the pieces that are certain now, and the text behind the call once it is complete."""

    def _begin(self, name: str) -> CallPiece:
        self.is_call = True
        length = self.format.id_length
        return CallPiece(self.index, id=self.format.id_prefix + secrets.token_hex(length)[:length], name=name)

    def _no_call(self) -> tuple[list[CallPiece], str]:
        """Nothing is taken; it is to be read as if no call had been expected."""
        self.is_complete = True
        rest, self.text = self.text, ""
        return [], rest


@dataclass(slots=True)
class ObjectReader(CallReader):
    """`{"name": ..., "arguments": {...}}`"""

    _nesting: _Nesting = field(default_factory=_Nesting)
    _read: int = 0
    _start: int | None = None
    """Of the arguments, as is `_end`."""
    _end: int | None = None
    _given: int = 0

    def feed(self, text: str) -> tuple[list[CallPiece], str]:
        self.text += text
        begun = self.text.lstrip()
        if begun and begun[0] != "{":
            return self._no_call()
        pieces: list[CallPiece] = []
        header = OBJECT_HEADER.match(self.text) if self._start is None else None
        if header is not None and (name := _name(header[1])) is not None:
            pieces.append(self._begin(name))
            self._start = self._given = header.end()
        self._scan()
        if self._start is not None:
            end = self._read if self._end is None else self._end
            if end > self._given:
                pieces.append(CallPiece(self.index, self.text[self._given : end]))
                self._given = end
        rest = ""
        if self.is_complete:
            self.text, rest = self.text[: self._read], self.text[self._read :]
            if self._start is None:
                pieces += self._whole()
        return pieces, rest

    def _scan(self) -> None:
        for position in range(self._read, len(self.text)):
            character = self.text[position]
            if character == "<" and not self._nesting.in_string:  # no JSON: the end marker came before the last brace
                self.is_complete = True
                return
            self._read = position + 1
            if self._nesting.take(character):
                begun = self._start is not None and position >= self._start
                if self._nesting.depth == 1 and begun and self._end is None:
                    self._end = position + 1
                if self._nesting.depth == 0:
                    self.is_complete = True
                    return

    def _whole(self) -> list[CallPiece]:
        """A call in another order or shape, read once it is complete; nothing if it is no call at all."""
        try:
            value = json.loads(self.text)
            if not isinstance(value, dict) or not _is_name(value.get("name")):
                return []
            arguments = value.get("arguments", value.get("parameters"))
            if isinstance(arguments, dict):
                text = _json(arguments)
            elif isinstance(arguments, str) and _is_text(arguments):
                text = arguments
            else:
                return []
        except (ValueError, RecursionError):
            return []
        return [self._begin(value["name"]), CallPiece(self.index, text)]


@dataclass(slots=True)
class NamedReader(CallReader):
    """`NAME[ARGS]{...}`, or with an id, `NAME[CALL_ID]123[ARGS]{...}`; the caller is given an id of ours."""

    _nesting: _Nesting = field(default_factory=_Nesting)
    _read: int = 0

    def feed(self, text: str) -> tuple[list[CallPiece], str]:
        self.text += text
        pieces: list[CallPiece] = []
        if not self.is_call:
            header = NAMED_HEADER.match(self.text)
            if header is None:
                return ([], "") if NAMED_HEADER_BEGUN.fullmatch(self.text) else self._no_call()
            pieces.append(self._begin(header[1]))
            self._read = header.end()
        start = self._read
        while self._read < len(self.text) and not self.is_complete:
            closes = self._nesting.take(self.text[self._read])
            self._read += 1
            self.is_complete = closes and self._nesting.depth == 0
        pieces.append(CallPiece(self.index, self.text[start : self._read]))
        rest, self.text = self.text[self._read :], self.text[: self._read]
        return pieces, rest


@dataclass(slots=True)
class XmlReader(CallReader):
    """`<function=NAME>`, a `<parameter=KEY>value</parameter>` for each argument, `</function>`; values by the schemas.

    One line break belongs to each tag, not to the value. A string goes out while it is written, any other value when
    its type is certain.
    """

    functions: Sequence[Mapping[str, Any]] = ()
    _parameters: Mapping[str, Any] = field(default_factory=dict)
    _types: frozenset[str | None] | None = None
    """Of the parameter that is being read; None between parameters."""
    _num_parameters: int = 0
    _begins_value: bool = False

    def feed(self, text: str) -> tuple[list[CallPiece], str]:
        self.text += text
        pieces: list[CallPiece] = []
        if not self.is_call:
            header = FUNCTION_HEADER.match(self.text)
            if header is None:
                return ([], "") if _may_become(self.text.lstrip(), FUNCTION, ">") else self._no_call()
            pieces += [self._begin(header[1]), CallPiece(self.index, "{")]
            self._parameters = next((f.get("parameters") or {} for f in self.functions if f["name"] == header[1]), {})
            self.text = self.text[header.end() :]
        written = ""
        while (part := self._between() if self._types is None else self._value()) is not None:
            written += part
            if self.is_complete:
                break
        if written:
            pieces.append(CallPiece(self.index, written))
        rest = ""
        if self.is_complete:
            rest, self.text = self.text, ""
        return pieces, rest

    def _between(self) -> str | None:
        """The arguments' text of the next tag; None: it is still to come. What is no tag of ours ends the call."""
        self.text = self.text.lstrip()
        if header := PARAMETER_HEADER.match(self.text):
            if header.end() == len(self.text) and not header[0].endswith("\n"):
                return None  # the line break may follow
            name = header[1]
            self._types = types_of(parameter(self._parameters, name), self._parameters)
            self.text = self.text[header.end() :]
            self._num_parameters += 1
            separator = ", " if self._num_parameters > 1 else ""
            self._begins_value = True
            return f"{separator}{json.dumps(name, ensure_ascii=False)}: "
        if not self.text or (FUNCTION_END.startswith(self.text) and self.text != FUNCTION_END):
            return None
        if _may_become(self.text, PARAMETER, ">"):
            return None
        self.is_complete = True
        self.text = self.text.removeprefix(FUNCTION_END)
        return "}"

    def _value(self) -> str | None:
        assert self._types is not None
        end = self.text.find(PARAMETER_END)
        is_text = self._types == {"string"}
        if end < 0:
            return self._part_of_text() if is_text else None
        value = self.text[:end].removesuffix("\n")
        self.text = self.text[end + len(PARAMETER_END) :]
        opening = '"' if self._begins_value else ""
        types, self._types = self._types, None
        return f'{opening}{_inner(value)}"' if is_text else _json(typed(value, types))

    def _part_of_text(self) -> str | None:
        """What is certain of a string; the rest may be its end."""
        kept = len(self.text)
        for length in range(min(len(PARAMETER_END), len(self.text)), 0, -1):
            if f"\n{PARAMETER_END}".startswith(self.text[-length:]) or PARAMETER_END.startswith(self.text[-length:]):
                kept -= length
                break
        if kept == 0:
            return None
        opening, self._begins_value = '"' if self._begins_value else "", False
        part, self.text = self.text[:kept], self.text[kept:]
        return opening + _inner(part)


def _name(text: str) -> str | None:
    """What a JSON string says; None where it is none, or is nothing that could be told."""
    try:
        name = json.loads(text)
    except ValueError:
        return None
    return name if _is_name(name) else None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _is_text(value)


def _is_text(text: str) -> bool:
    """Half of a surrogate pair, which JSON can escape, is no character: it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Any) -> str:
    """Raises ValueError where JSON has no word for a number: 1e999 is read as infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if _is_text(text) else json.dumps(value)


def _inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _may_become(text: str, tag: str, end: str) -> bool:
    """Whether the text is the beginning of a tag that has not come to its end yet."""
    return tag.startswith(text) or (text.startswith(tag) and end not in text)
