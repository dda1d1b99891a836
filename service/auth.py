"""API keys: read from a file, kept only as hashes, compared in constant time, read again when the file changes.

Lines are `name:key` or `name:sha256:<64 hex digits>`; blank lines and lines that begin with `#` are skipped. Knows
nothing of HTTP: who needs which key is decided in `service.http.gate`. Runs in the API process, on the event loop.
"""

import hashlib
import hmac
import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


class KeyFileError(Exception):
    """The message names file and line, never what the line holds."""


def hash_key(key: str) -> bytes:
    """Keys are long and random, so a plain hash keeps them; a password would need a slow one."""
    return hashlib.sha256(key.encode()).digest()


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
        if secret.startswith("sha256:"):
            hashed = _SHA256.fullmatch(secret)
            if hashed is None:
                raise KeyFileError(f"{origin}, line {number}: after sha256: there must be 64 hex digits")
            keys[name] = bytes.fromhex(hashed[1])
        elif _KEY.fullmatch(secret):
            keys[name] = hash_key(secret)
        else:
            raise KeyFileError(f"{origin}, line {number}: a key is 8 to 512 printable ASCII characters without spaces")
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
        """The key's name, or None. Compares with every key, so that the time tells nothing about which one is near."""
        self._refresh(now)
        candidate = hash_key(key)
        found: str | None = None
        for name, known in self._keys.items():
            if hmac.compare_digest(candidate, known):
                found = name
        return found

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

    def _current_stamp(self) -> tuple[int, int, int]:
        """Follows links: Kubernetes swaps a mounted secret by its directory's link."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise KeyFileError(f"cannot read {self._path}: {error.strerror}") from error
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> dict[str, bytes]:
        try:
            return parse_keys(self._path.read_text(encoding="utf-8"), str(self._path))
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"cannot read {self._path}: {error}") from error


class Authenticator:
    """The keys for the service and, apart from them, those for its management."""

    def __init__(self, api_keys: Path | None, admin_keys: Path | None) -> None:
        self._api_keys = KeyFile(api_keys) if api_keys is not None else None
        self._admin_keys = KeyFile(admin_keys) if admin_keys is not None else None

    @property
    def needs_key(self) -> bool:
        return self._api_keys is not None

    @property
    def allows_management(self) -> bool:
        return self._admin_keys is not None

    def client(self, key: str, now: float) -> str | None:
        return self._api_keys.find(key, now) if self._api_keys is not None else None

    def manager(self, key: str, now: float) -> str | None:
        return self._admin_keys.find(key, now) if self._admin_keys is not None else None
