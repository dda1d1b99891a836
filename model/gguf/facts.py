"""A GGUF file's keys and tensors, asked for by kind: every value is checked before anything is built on it.

Knows which architecture a file names, and no architecture. No torch; both processes.
"""

import math
from array import array
from typing import Any

from model.architectures.raw import RawConfig
from model.errors import CheckpointError, UnsupportedArchitectureError
from model.gguf.container import GgufFile, TensorInfo

Config = dict[str, Any]
"""What is made of them: a `config.json`, or a part of one."""


class Facts:
    """A file's keys, asked for by kind (those of its architecture without its name), and its tensors."""

    def __init__(self, files: list[GgufFile]) -> None:
        """Raises: CheckpointError for a file without an architecture, or a set that is not whole."""
        self.files = files
        self.keys = RawConfig(files[0].metadata, files[0].path.name)
        if (count := self.keys.whole("split.count", 0)) not in (0, len(files)):
            raise self.keys.wrong("split.count", f"{len(files)}, the files there are ({count} of the set are wanted)")
        self.architecture = self.keys.text("general.architecture")
        self.tensors: dict[str, TensorInfo] = {name: info for file in files for name, info in file.tensors.items()}

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; where a file gives one for each layer, they must be the same."""
        value = self.keys.values.get(self.key(name))
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return RawConfig({self.key(name): value[0]}, self.keys.file).size(self.key(name))
        return self.keys.size(self.key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, 0 or more."""
        found = self.keys.number(self.key(name), default)
        if not 0 <= found < math.inf:
            raise self.keys.wrong(self.key(name), "a finite number, 0 or more")
        return found

    def positive(self, name: str, default: float | None = None) -> float:
        found = self.number(name, default)
        if found == 0:
            raise self.keys.wrong(self.key(name), "a finite number above 0")
        return found

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.keys

    def token_id(self, role: str, default: int | None = None) -> int | None:
        """That of a role like "bos" in the tokenizer; an id that no token has counts as none."""
        key, tokens = f"tokenizer.ggml.{role}_token_id", self.keys.values.get("tokenizer.ggml.tokens", ())
        id = self.keys.whole(key) if key in self.keys else default
        return id if id is not None and 0 <= id < len(tokens) else None

    def rows(self, tensor: str) -> int:
        info = self.tensors.get(tensor)
        if info is None or not info.shape:
            raise CheckpointError(f"{self.keys.file}: tensor {tensor!r} is missing", file=self.keys.file, tensor=tensor)
        return info.shape[0]

    def factors(self, tensor: str, count: int) -> list[float] | None:
        """So many positive numbers of a vector in 32 bits; None if there is none of that name."""
        info = self.tensors.get(tensor)
        if info is None:
            return None
        if info.kind.name != "F32":
            raise self.refused(f"tensor {tensor!r} is stored as {info.kind.name}, not F32")
        if info.shape != (count,):
            raise CheckpointError(
                f"{self.keys.file}: tensor {tensor!r} has the shape {list(info.shape)}; expected [{count}]",
                file=self.keys.file,
                tensor=tensor,
            )
        values = array("f")
        values.frombytes(next(file for file in self.files if tensor in file.tensors).read(info))
        if not all(0 < value < math.inf for value in values):
            raise CheckpointError(
                f"{self.keys.file}: tensor {tensor!r} has a factor that is not finite and above 0",
                file=self.keys.file,
                tensor=tensor,
            )
        return values.tolist()

    def refused(self, reason: str) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(f"{self.keys.file}: {reason}", file=self.keys.file)
