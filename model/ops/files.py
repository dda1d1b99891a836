"""Where the operators' sources are, and the library that is compiled from just these: its name tells their digest."""

from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))


def _digest() -> str:
    found = sha256()
    for path in (*SOURCES, *HEADERS):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


LIBRARY = FOLDER / f"kernels-{_digest()}.so"


def outdated_libraries() -> list[Path]:
    """Libraries that were compiled from other sources."""
    return [path for path in FOLDER.glob("kernels*.so") if path != LIBRARY]
