"""Where the operators' sources are, and the library that is compiled from them."""

from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
HEADERS = sorted(FOLDER.glob("*.h"))
LIBRARY = FOLDER / "kernels.so"


def is_current() -> bool:
    """Whether the library is there and no source is newer than it."""
    return LIBRARY.exists() and all(path.stat().st_mtime <= LIBRARY.stat().st_mtime for path in (*SOURCES, *HEADERS))
