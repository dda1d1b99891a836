"""What `--model` and `--alias` say: where a checkpoint is, the names it is served under, and its version's label.

Only reads the text (and asks whether such a folder exists); finding, downloading and loading are others' work.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_FILE_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHOWN_CHARS = 200
"""Of a location, in a message."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`location` is a folder, a GGUF file or a hub name; `version` is None where the checkpoint shall name itself."""

    location: str
    name: str
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """Reads `LOCATION[=NAME][@VERSION]`; a folder whose path holds `=` or `@` is taken whole where it exists.

        `models/tiny=small@2` is the folder models/tiny, served as `small`, version `2`. Raises ValueError.
        """
        try:
            location, name, version = _split(text.strip())
            name = name or (_default_name(location) if location else "")
        except OSError as error:  # longer than any path may be, or in a folder that is not ours to look into
            raise ValueError(f"'{text[:SHOWN_CHARS]}' cannot be looked for: {error.strerror}") from None
        if not location:
            raise ValueError(
                f"'{text}' names no folder, file or hub model: write FOLDER_OR_GGUF_OR_HUB_NAME[=NAME][@VERSION]"
            )
        if not _SERVED_NAME.fullmatch(name):
            raise ValueError(f"served name '{name}' must be 1 to 128 letters, digits, '.', '_', '/' or '-'; add =NAME")
        if version and not _VERSION.fullmatch(version):
            raise ValueError(f"version '{version}' must be 1 to 64 letters, digits, '.', '_' or '-'")
        return cls(location, name, version or None)

    def __str__(self) -> str:
        return f"{self.location}={self.name}" + (f"@{self.version}" if self.version else "")


def parse_alias(text: str) -> tuple[str, str]:
    """Reads `ALIAS=NAME`: another name, and the one that it stands for. Raises ValueError."""
    alias, equals, name = (part.strip() for part in text.partition("="))
    if not (equals and _SERVED_NAME.fullmatch(alias) and name):
        raise ValueError(f"'{text}' must be ALIAS=NAME, the alias 1 to 128 letters, digits, '.', '_', '/' or '-'")
    return alias, name


def _split(text: str) -> tuple[str, str, str]:
    if not text or Path(text).exists():
        return text, "", ""
    location, equals, name = text.rpartition("=")
    if equals:
        name, _, version = name.partition("@")
        return location, name, version
    folder, slash, last = text.rpartition("/")
    last, _, version = last.partition("@")
    return folder + slash + last, "", version


def _default_name(location: str) -> str:
    """A folder's own name, or a file's without its ending; a hub model keeps its whole name, `owner/model`."""
    path = Path(location)
    is_hub_name = not path.exists() and location.count("/") == 1 and location[0] not in "./~"
    return (
        location
        if is_hub_name
        else _FILE_ENDING.sub("", path.absolute().name if path.is_file() else path.resolve().name)
    )
