"""Reading a checkpoint's JSON files: every value is checked for its kind before anything is built on it.

A wrong, missing or unreadable value is a `CheckpointError` that names the file and the key. Knows no architecture.
No torch; both processes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: CheckpointError if the file is absent, unreadable, not JSON or not an object.
    """
    value = _read(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object", file=path.name)
    return value


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """The JSON array of objects in a file (`modules.json`).

    Raises: CheckpointError, as `read_json`.
    """
    value = _read(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise CheckpointError(f"{path} holds no JSON array of objects", file=path.name)
    return value


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes", file=path.name)
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", file=path.name) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", file=path.name) from error


class RawConfig:
    """A `config.json` (or a section of one) whose values are asked for by kind; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], file: str = "config.json") -> None:
        self.values = values
        self.file = file

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.whole(key, default)
        if not 0 < value < 1 << 32:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        try:
            return float(value)
        except OverflowError as error:
            raise self.wrong(key, "a number of float64") from error

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise self.wrong(key, "a list of numbers")
        return tuple(float(item) for item in value)

    def sizes(self, key: str) -> tuple[int, ...]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(type(item) is int and 0 < item < 1 << 32 for item in value):
            raise self.wrong(key, "a list of positive whole numbers")
        return tuple(value)

    def wholes(self, key: str) -> tuple[int, ...]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self.wrong(key, "a list of whole numbers, 0 or more")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def section(self, key: str) -> "RawConfig":
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return RawConfig(value, self.file)

    def choice(self, key: str, choices: Mapping[str, Any], default: str | None = None) -> Any:
        """The meaning of a string that must be one of `choices`."""
        value = self.text(key, default)
        if value not in choices:
            raise self.wrong(key, f"one of {', '.join(sorted(choices))}")
        return choices[value]

    def wrong(self, key: str, expected: str) -> CheckpointError:
        shown = repr(self.values.get(key))[:80]
        return CheckpointError(f"{self.file}: {key!r} is {shown}; expected {expected}", file=self.file)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.file} has no {key!r}", file=self.file)
        return value
