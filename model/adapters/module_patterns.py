"""Names of modules as PEFT's settings write them: plain ones, or regular expressions, matched in linear time.

An adapter's folder may come from anyone, and Python's `re` backtracks: one pattern could hold a worker for ever, and
every other thread of it. So a pattern becomes states that are all followed at once (Thompson, "Regular expression
search algorithm", 1968; Cox, "Regular expression matching can be simple and fast"). Read are characters, classes,
escapes such as `\\d`, groups, alternatives, quantifiers, `^` and `$`; what no such machine can do (looking around,
references back) is refused. Plain Python, no torch; both processes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CHARACTERS = 1000
MAX_DEPTH = 20
MAX_STATES = 2_000

CHARACTER = re.compile(r"\\[dDwWsS]|\\[^A-Za-z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()\[\]{}*+?|^$]", re.DOTALL)
QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d{1,3})\}|\{(\d{0,3}),(\d{0,3})\})\??")
COUNTS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
LITERAL = re.compile(r"[\w.-]+")


class ModulePattern:
    """The end of a module's name, from a dot on, as `get_pattern_key` (`utils/other.py` of PEFT) takes it."""

    def __init__(self, text: str) -> None:
        """Raises: ValueError, which says what is wrong with the pattern."""
        self._literal = re.compile(rf"(?:.*\.)?(?:{text})$") if LITERAL.fullmatch(text) else None
        if self._literal is None:
            self._machine = _Machine(_Reader(text).read())

    @property
    def num_states(self) -> int:
        """What a match may cost, by character of the name; none for a plain name."""
        return 0 if self._literal is not None else self._machine.num_states

    def fits(self, module: str) -> bool:
        if self._literal is not None:
            return self._literal.match(module) is not None
        starts = {0} | {index + 1 for index, letter in enumerate(module) if letter == "."}
        return self._machine.accepts(module, starts)


@dataclass(frozen=True, slots=True)
class _Anchor:
    at_end: bool


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: "_Node"
    least: int
    most: int | None


_Node = re.Pattern[str] | _Anchor | _Sequence | _Choice | _Repeat
"""A compiled pattern stands for one character."""


class _Reader:
    """The tree of a pattern, read from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
        self._text = text
        self._place = 0

    def read(self) -> _Node:
        tree = self._choice(0)
        if self._place < len(self._text):
            raise self._wrong()
        return tree

    def _choice(self, depth: int) -> _Node:
        options = [self._sequence(depth)]
        while self._take("|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._place < len(self._text) and self._text[self._place] not in "|)":
            parts.append(self._quantified(self._part(depth)))
        return _Sequence(tuple(parts))

    def _part(self, depth: int) -> _Node:
        if self._take("^") or self._take("$"):
            return _Anchor(at_end=self._text[self._place - 1] == "$")
        if not self._take("(?:") and (self._text.startswith("(?", self._place) or not self._take("(")):
            return self._character()
        if depth == MAX_DEPTH:
            raise ValueError(f"groups within more than {MAX_DEPTH} others")
        inner = self._choice(depth + 1)
        if not self._take(")"):
            raise self._wrong()
        return inner

    def _character(self) -> _Node:
        found = CHARACTER.match(self._text, self._place)
        if found is None:
            raise self._wrong()
        try:
            one = re.compile(found[0])
        except re.error as error:
            raise ValueError(str(error)) from error
        self._place = found.end()
        return one

    def _quantified(self, part: _Node) -> _Node:
        found = QUANTIFIER.match(self._text, self._place)
        if found is None:
            return part
        if isinstance(part, _Anchor):
            raise self._wrong()
        self._place = found.end()
        sign, exactly, least, most = found.groups()
        if sign:
            return _Repeat(part, *COUNTS[sign])
        if exactly:
            return _Repeat(part, int(exactly), int(exactly))
        if most and int(most) < int(least or 0):
            raise ValueError(f"has {found[0]!r}")
        return _Repeat(part, int(least or 0), int(most) if most else None)

    def _take(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._place)
        self._place += len(mark) if found else 0
        return found

    def _wrong(self) -> ValueError:
        rest = self._text[self._place : self._place + 20]
        return ValueError(f"cannot be read at {rest!r}" if rest else "ends too early")


class _Machine:
    """States, each with what it takes (a character; an anchor or nothing, which take none) and those that follow."""

    def __init__(self, tree: _Node) -> None:
        self._takes: list[re.Pattern[str] | _Anchor | None] = []
        self._follow: list[list[int]] = []
        self._num_steps = 0
        self._last = self._state(None, [])
        self._first = self._add(tree, self._last)

    @property
    def num_states(self) -> int:
        return len(self._takes)

    def accepts(self, text: str, starts: Iterable[int]) -> bool:
        """Whether the whole rest of the text fits, from any of the starts on. Takes len(text) times states."""
        wanted = set(starts)
        states: set[int] = set()
        for index in range(len(text) + 1):
            states = self._reached(states | ({self._first} if index in wanted else set()), index, len(text))
            if index == len(text):
                break
            states = {
                following
                for state in states
                if isinstance(takes := self._takes[state], re.Pattern) and takes.match(text[index])
                for following in self._follow[state]
            }
        return self._last in states

    def _reached(self, states: Iterable[int], index: int, end: int) -> set[int]:
        """Those states, and the ones behind them that take no character."""
        waiting, found = list(states), set(states)
        while waiting:
            state = waiting.pop()
            takes = self._takes[state]
            if takes is None or (isinstance(takes, _Anchor) and index == (end if takes.at_end else 0)):
                new = [following for following in self._follow[state] if following not in found]
                found.update(new)
                waiting += new
        return found

    def _add(self, node: _Node, then: int) -> int:
        """Where the states of a node begin that go on to `then`."""
        self._num_steps += 1
        if self._num_steps > MAX_STATES:
            raise ValueError("repeats too much")
        match node:
            case _Sequence():
                for part in reversed(node.parts):
                    then = self._add(part, then)
                return then
            case _Choice():
                return self._state(None, [self._add(option, then) for option in node.options])
            case _Repeat():
                return self._repeat(node, then)
        return self._state(node, [then])

    def _repeat(self, node: _Repeat, then: int) -> int:
        end = then
        if node.most is None:
            then = self._state(None, [end])
            self._follow[then].append(self._add(node.part, then))
        else:
            for _ in range(node.most - node.least):
                then = self._state(None, [self._add(node.part, then), end])
        for _ in range(node.least):
            then = self._add(node.part, then)
        return then

    def _state(self, takes: re.Pattern[str] | _Anchor | None, follow: list[int]) -> int:
        self._takes.append(takes)
        self._follow.append(follow)
        return len(self._takes) - 1
