"""API keys: read from a file, kept only as hashes, compared in constant time, read again when the file changes.

Lines are `name:key` or `name:sha256:<64 hex digits>`; blank lines and lines that begin with `#` are skipped. One key
more may be given without a file. Knows nothing of HTTP: who needs which key is decided in `service.http.gate`. Runs in
the API process, on the event loop.
"""

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from service.file_stamp import FileStamp, file_stamp

log = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
SINGLE_KEY_NAME = "--api-key"
"""Whoever comes with the key that is in no file; no name in a file begins with a dash."""


class KeyFileError(Exception):
    """The message names file and line, never what the line holds."""


def hash_key(key: str) -> bytes:
    """Keys are long and random, so a plain hash keeps them; a password would need a slow one."""
    return hashlib.sha256(key.encode()).digest()


def read_key(secret: str) -> bytes:
    """The hash of a key, or the one that stands in its place. Raises ValueError, which does not tell the key."""
    if secret.startswith("sha256:"):
        hashed = _SHA256.fullmatch(secret)
        if hashed is None:
            raise ValueError("after sha256: there must be 64 hex digits")
        return bytes.fromhex(hashed[1])
    if not _KEY.fullmatch(secret):
        raise ValueError("a key is 8 to 512 printable ASCII characters without spaces")
    return hash_key(secret)


def find_key(key: str, known: Mapping[str, bytes]) -> str | None:
    """The key's name, or None. Compares with every key, so that the time tells nothing about which one is near."""
    candidate = hash_key(key)
    found: str | None = None
    for name, hashed in known.items():
        if hmac.compare_digest(candidate, hashed):
            found = name
    return found


def parse_keys(text: str, origin: str) -> dict[str, bytes]:
    """Key name to hash. Raises KeyFileError."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, secret = line.partition(":")
        if not colon or not _NAME.fullmatch(name):
            raise KeyFileError(f"{origin}, line {number}: write name:key or name:sha256:<64 hex digits>")
        if name in keys:
            raise KeyFileError(f"{origin}, line {number}: the name '{name}' is there already")
        try:
            keys[name] = read_key(secret)
        except ValueError as error:
            raise KeyFileError(f"{origin}, line {number}: {error}") from None
    if not keys:
        raise KeyFileError(f"{origin} holds no key")
    return keys


class KeyFile:
    """The keys of one file. A change that cannot be read keeps the former keys, and says so in the log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._current_stamp()
        self._keys = self._read()
        self._checked = 0.0

    def find(self, key: str, now: float) -> str | None:
        """The key's name, or None."""
        self._refresh(now)
        return find_key(key, self._keys)

    def _refresh(self, now: float) -> None:
        if now - self._checked < CHECK_INTERVAL_SECONDS:
            return
        self._checked = now
        try:
            stamp = self._current_stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._keys = self._read()
        except KeyFileError as error:
            log.error("keys not reloaded, the former ones stay valid: %s", error)
        else:
            log.info("keys reloaded", extra={"file": str(self._path), "num_keys": len(self._keys)})

    def _current_stamp(self) -> FileStamp:
        try:
            return file_stamp(self._path)
        except OSError as error:
            raise KeyFileError(f"cannot read {self._path}: {error.strerror}") from error

    def _read(self) -> dict[str, bytes]:
        try:
            return parse_keys(self._path.read_text(encoding="utf-8"), str(self._path))
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"cannot read {self._path}: {error}") from error


class Authenticator:
    """The keys for the service and, apart from them, those for its management."""

    def __init__(self, api_keys: Path | None, admin_keys: Path | None, single_key: str | None = None) -> None:
        """`single_key` is for the service, beside those of the file. Raises KeyFileError, and ValueError for it."""
        self._api_keys = KeyFile(api_keys) if api_keys is not None else None
        self._admin_keys = KeyFile(admin_keys) if admin_keys is not None else None
        self._single_key = {SINGLE_KEY_NAME: read_key(single_key)} if single_key is not None else {}

    @property
    def needs_key(self) -> bool:
        return self._api_keys is not None or bool(self._single_key)

    @property
    def allows_management(self) -> bool:
        return self._admin_keys is not None

    def client(self, key: str, now: float) -> str | None:
        of_file = self._api_keys.find(key, now) if self._api_keys is not None else None
        return find_key(key, self._single_key) or of_file

    def manager(self, key: str, now: float) -> str | None:
        return self._admin_keys.find(key, now) if self._admin_keys is not None else None
