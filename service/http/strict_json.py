"""Refuses what Python's JSON reader lets through: NaN, Infinity, 1e999, a name twice, lone surrogates, deep nesting.

Pure functions over bytes, in time proportional to them whatever they say. FastAPI reads the same bytes again: what
passes here means the same there.
"""

import json
import math
from collections.abc import Iterable

from service.errors import InvalidRequest

MAX_NAMES = 4096
"""Of one object: each may be a fault of its own."""


class InvalidJson(InvalidRequest):
    code = "invalid_json"


def check_json(body: bytes, max_depth: int) -> object:
    """What the body says. Raises InvalidJson, whose message says what is wrong and where."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from error
    if text.startswith("\ufeff"):
        raise InvalidJson("the body is not valid JSON: it begins with a byte order mark (U+FEFF)")
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidJson(f"the body is not valid JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise _too_deep(max_depth) from error
    _check_depth(value, max_depth)
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = _first_repeated(name for name, _ in pairs)
        raise InvalidJson(f"the name '{repeated[:100]}' is given twice in one object", param=_printable(repeated))
    if len(found) > MAX_NAMES:
        raise InvalidJson(f"an object has {len(found):,} names; the limit is {MAX_NAMES:,}")
    return found


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("called only where a name is there twice")


def _printable(name: str) -> str | None:
    return name if name.isprintable() and len(name) <= 100 else None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidJson(f"the number {text[:50]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 40:
        raise InvalidJson(f"the number {text[:40]}... has {len(text)} digits")
    return int(text)


def _refuse(name: str) -> float:
    raise InvalidJson(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_names, parse_float=_finite, parse_constant=_refuse, parse_int=_integer
)


def _too_deep(max_depth: int) -> InvalidJson:
    return InvalidJson(f"the body is nested more than {max_depth} levels deep")


def _check_depth(value: object, max_depth: int) -> None:
    level: list[object] = [value]
    for _ in range(max_depth):
        deeper: list[object] = []
        for entry in level:
            children = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
            deeper += [child for child in children if isinstance(child, dict | list)]
        if not deeper:
            return
        level = deeper
    raise _too_deep(max_depth)


def _check_surrogates(value: object) -> None:
    """Half of a surrogate pair is no character: it could not be written out as UTF-8 again."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidJson(
            "a string holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        ) from error
