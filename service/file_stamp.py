"""Whether a file is still the one that was read: what keys and certificates are watched by.

Runs in the API process.
"""

from pathlib import Path

FileStamp = tuple[int, int, int]


def file_stamp(path: Path) -> FileStamp:
    """Differs as soon as the file does. Follows links: Kubernetes swaps a mounted secret by its directory's link.

    Raises OSError.
    """
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
