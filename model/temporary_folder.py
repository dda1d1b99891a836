"""Folders under TMPDIR that go with whoever made them: at once, with its object, or after its process was killed.

A process holds a lock on each of its folders, which the system takes back whatever ends the process; what nobody holds
was left behind and is removed. Process ids would not do: containers that share a folder count them anew. Knows nothing
of what the folders hold. No torch; both processes.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["adapter", "gguf", "ranks"]


class TemporaryFolder:
    """There for as long as this object is, or until `remove` is called."""

    def __init__(self, kind: Kind) -> None:
        """Raises: OSError, where there is no room for it."""
        remove_abandoned()
        self.path, lock = _make(_prefix(kind))
        self.remove = weakref.finalize(self, _remove, self.path, lock)


def remove_abandoned() -> None:
    """Removes this user's folders whose processes are gone; what cannot be locked or removed stays."""
    root = Path(tempfile.gettempdir())
    for path in [path for kind in get_args(Kind) for path in root.glob(f"{_prefix(kind)}*")]:
        with contextlib.suppress(OSError):
            lock = _open(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _prefix(kind: Kind) -> str:
    return f"slimpajama-{kind}-"


def _make(prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds it. One that is removed before it is held is made anew."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        with contextlib.suppress(FileNotFoundError):
            lock = _open(path)
            with contextlib.suppress(OSError):  # a file system without locks: there, nothing is taken for abandoned
                fcntl.flock(lock, fcntl.LOCK_SH)
            if path.is_dir():
                return path, lock
            os.close(lock)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
