"""The server's certificate, read again when its files change: whoever renews it does not restart the service.

Connections that there are keep what they began with; new ones get the new certificate. Runs in the API process, on the
event loop.
"""

import logging
import ssl
from pathlib import Path

from service.file_stamp import FileStamp, file_stamp

log = logging.getLogger(__name__)


class Certificate:
    """What a TLS context shows, as two files say. A change that cannot be used leaves it as it was, and is logged."""

    def __init__(self, context: ssl.SSLContext, chain: Path, key: Path) -> None:
        """The context has read both files."""
        self._context = context
        self._chain, self._key = chain, key
        self._seen = self._stamps()

    def refresh(self) -> None:
        """Looks at the files, and reads them if they are not those that were seen last."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            # Tried on another context first: one that is given a key that does not fit has lost its own.
            check_certificate(self._chain, self._key)
            _load(self._context, self._chain, self._key)
        except OSError as error:
            log.error("certificate not reloaded, the former one stays in use: %s", error)
        else:
            log.info("certificate reloaded", extra={"file": str(self._chain)})
        self._seen = stamps

    def _stamps(self) -> tuple[FileStamp | None, ...]:
        return tuple(_stamp(path) for path in (self._chain, self._key))


def check_certificate(chain: Path, key: Path) -> None:
    """Raises OSError where a server cannot use the two files."""
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), chain, key)


def _load(context: ssl.SSLContext, chain: Path, key: Path) -> None:
    """Raises OSError, which the faults of certificates are too. Never asks a terminal for a password."""
    context.load_cert_chain(chain, key, password="")


def _stamp(path: Path) -> FileStamp | None:
    try:
        return file_stamp(path)
    except OSError:
        return None
