"""GGUF files as containers: keys with values, and where each tensor's bytes are; the file is mapped, never read whole.

Every length in a file is held against the bytes that are left before anything is made of it. Knows no key's meaning and
no tensor's. No torch; both processes.

Format: github.com/ggml-org/ggml, docs/gguf.md: versions 2 and 3, little-endian.
"""

import math
import mmap
import re
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.gguf.kinds import Kind, kind_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 40
SAMPLED_BYTES = 4 << 10
MAX_ITEMS = 1 << 24
"""Of an array: sixty times the largest vocabularies."""

STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""Value types to the letters by which `struct` and `array` know them."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` has the rows first, as elsewhere here (files have the innermost dimension first)."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    """The place of its first byte in the file."""
    num_bytes: int


class GgufFile:
    """One file, open (mapped) until `close`."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError for a file that cannot be read, is cut off, or says what cannot be."""
        self.path = path
        self._map = _mapped(path)
        try:
            cursor = _Cursor(self._map, path.name)
            num_tensors, num_entries = _header(cursor)
            self.metadata: Mapping[str, Any] = _entries(cursor, num_entries)
            infos = _tensor_infos(cursor, num_tensors)
            self.data_start = self._aligned(cursor.place)
            self.tensors: Mapping[str, TensorInfo] = {info.name: self._placed(info) for info in infos}
            self._check_overlaps()
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()

    def read(self, info: TensorInfo, first: int = 0, *, num_bytes: int | None = None) -> bytes:
        """A copy of a tensor's bytes, or of so many from the `first` on."""
        end = info.num_bytes if num_bytes is None else min(first + num_bytes, info.num_bytes)
        return self._map[info.start + first : info.start + end]

    def samples(self) -> Iterator[bytes]:
        """All that stands before the tensors, and both ends of each of them: what a fingerprint is made of."""
        yield self._map[: self.data_start]
        for info in self.tensors.values():
            for place in (0, max(0, info.num_bytes - SAMPLED_BYTES)):
                yield self.read(info, place, num_bytes=SAMPLED_BYTES)

    def _aligned(self, place: int) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _broken(self.path.name, f"its alignment is {alignment!r}, which is no power of two")
        return -(-place // alignment) * alignment

    def _placed(self, info: TensorInfo) -> TensorInfo:
        """With its place in the file, which must have all of it."""
        kind, start = info.kind, self.data_start + info.start
        if not all(0 < size <= MAX_SIZE for size in info.shape):
            raise self._refused(info, f"has the shape {list(info.shape)}; sizes are 1 to {MAX_SIZE:,}")
        if not kind.is_read:
            return TensorInfo(info.name, kind, info.shape, start, 0)
        row = info.shape[-1] if info.shape else 1
        if row % kind.num_values:
            raise self._refused(info, f"has rows of {row:,} values; {kind.name} has {kind.num_values} a block")
        num_bytes = math.prod(info.shape) // kind.num_values * kind.num_bytes
        if start + num_bytes > len(self._map):
            raise self._refused(info, f"ends {start + num_bytes - len(self._map):,} bytes behind the end of the file")
        return TensorInfo(info.name, kind, info.shape, start, num_bytes)

    def _check_overlaps(self) -> None:
        """A small file could stand for any number of large tensors else."""
        placed = sorted(self.tensors.values(), key=lambda info: info.start)
        for before, info in pairwise(placed):
            if before.start + before.num_bytes > info.start:
                raise self._refused(info, f"begins before the end of {before.name!r}")

    def _refused(self, info: TensorInfo, reason: str) -> CheckpointError:
        file = self.path.name
        return CheckpointError(f"{file}: tensor {info.name!r} {reason}", file=file, tensor=info.name)


def files_of(location: Path) -> tuple[Path, ...]:
    """The GGUF files that a path stands for: a file, all parts of the set whose first it is, or what a folder holds.

    Empty where a folder holds none, or holds safetensors as well: those are read then. Projectors of images
    (`mmproj-...`) beside a language model are left aside.

    Raises: CheckpointError if a part is missing, or if a folder holds several models.
    """
    if location.is_file():
        return _parts(location) if location.suffix == SUFFIX else ()
    found = models_of(location)
    if not found or any(location.glob("*.safetensors")):
        return ()
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{location} holds several GGUF models ({names}); give the file that is meant")
    return _parts(found[0])


def models_of(folder: Path) -> tuple[Path, ...]:
    """The files by which the models in a folder are given: of a set its first part, whether it is there or not."""
    found = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if not path.name.startswith("mmproj")]
    return tuple(dict.fromkeys(_first_part(path) for path in found))


def _first_part(path: Path) -> Path:
    part = PART.fullmatch(path.name)
    return path if part is None else path.with_name(f"{part[1]}-00001-of-{part[3]}{SUFFIX}")


def _parts(path: Path) -> tuple[Path, ...]:
    part = PART.fullmatch(path.name)
    if part is None:
        return (path,)
    stem, number, count = part[1], int(part[2]), int(part[3])
    if count == 0:
        raise CheckpointError(f"{path.name} cannot be part {number} of none", file=path.name)
    if number != 1:
        raise CheckpointError(f"{path.name} is part {number} of {count}; give the first one", file=path.name)
    found = tuple(path.with_name(f"{stem}-{index:05}-of-{count:05}{SUFFIX}") for index in range(1, count + 1))
    for index, each in enumerate(found, start=1):
        if not each.is_file():
            raise CheckpointError(f"part {index} of {count} is missing: {each}", file=each.name)
    return found


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", file=path.name) from error


def _broken(file: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a sound GGUF file: {reason}", file=file)


class _Cursor:
    """Reads on from a place, and never behind the end."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self.place = 0
        self.file = file
        self._data = data

    def take(self, num_bytes: int) -> bytes:
        self.check(num_bytes)
        self.place += num_bytes
        return self._data[self.place - num_bytes : self.place]

    def check(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self.place:
            raise _broken(self.file, f"it is cut off: {num_bytes:,} bytes are to follow byte {self.place:,}")

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        # Names are shown and token texts compared; bytes that are no UTF-8 are of no use in either.
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == BOOL:
            return self.number("B") != 0
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        raise _broken(self.file, f"a value is of the unknown type {kind}")

    def _array(self, kind: int, length: int) -> list[Any]:
        if length > MAX_ITEMS:
            raise _broken(self.file, f"an array has {length:,} items; {MAX_ITEMS:,} are allowed")
        if kind in NUMBERS:
            values = array(NUMBERS[kind])
            self.check(length * values.itemsize)
            values.frombytes(self.take(length * values.itemsize))
            return values.tolist()
        if kind == BOOL:
            return [value != 0 for value in self.take(length)]
        if kind == STRING:
            self.check(8 * length)
            return [self.text() for _ in range(length)]
        raise _broken(self.file, f"an array is of the type {kind}, which is not read")


def _header(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and how many keys there are."""
    if cursor.take(4) != MAGIC:
        raise _broken(cursor.file, f"it does not begin with {MAGIC.decode()}")
    version = cursor.number("I")
    if version not in VERSIONS:
        order = " (is it big-endian?)" if version & 0xFFFF == 0 else ""
        raise _broken(cursor.file, f"its version is {version}{order}; versions 2 and 3, little-endian, are read")
    return cursor.number("Q"), cursor.number("Q")


def _entries(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cursor.check(13 * count)
    for _ in range(count):
        key = cursor.text()
        if key in found:
            raise _broken(cursor.file, f"it has {key!r} twice")
        found[key] = cursor.value(cursor.number("I"))
    return found


def _tensor_infos(cursor: _Cursor, count: int) -> list[TensorInfo]:
    """Their places still counted from where the tensors begin."""
    cursor.check(24 * count)
    found: dict[str, TensorInfo] = {}
    take: Callable[[str], int] = cursor.number
    for _ in range(count):
        name, num_dimensions = cursor.text(), take("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise _broken(cursor.file, f"tensor {name!r} has {num_dimensions} dimensions; {MAX_DIMENSIONS} are allowed")
        if name in found:
            raise _broken(cursor.file, f"it has the tensor {name!r} twice")
        shape = tuple(take("Q") for _ in range(num_dimensions))
        found[name] = TensorInfo(name, kind_of(take("I")), shape[::-1], take("Q"), 0)
    return list(found.values())
