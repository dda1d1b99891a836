"""Bodies that come compressed, made plain piece by piece, so that a few bytes cannot become more than the limit allows.

Pure functions over bytes; knows nothing of limits but what it is told. Runs in the API process, on the event loop.
"""

import zlib
from collections.abc import Mapping

from service.errors import InvalidRequest
from service.http.envelope import UnsupportedMediaType

GZIP_WINDOW = 16 + zlib.MAX_WBITS
PLAIN = "identity"


class InvalidEncoding(InvalidRequest):
    code = "invalid_encoding"


class Inflater:
    """One gzip stream, as it arrives."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(GZIP_WINDOW)

    def feed(self, chunk: bytes, room: int) -> bytes:
        """What the chunk adds to the body; one byte more than `room` tells that there is more of it.

        Raises InvalidEncoding.
        """
        try:
            plain = self._stream.decompress(chunk, room + 1)
        except zlib.error as error:
            raise InvalidEncoding(f"the body is not gzip, though Content-Encoding says so: {error}") from error
        if self._stream.unused_data:
            raise InvalidEncoding("the body goes on after the end of its gzip stream")
        return plain

    def finish(self) -> None:
        """Raises InvalidEncoding if the stream is not whole."""
        if not self._stream.eof:
            raise InvalidEncoding("the body ends in the middle of its gzip stream")


def inflater_of(headers: Mapping[bytes, bytes]) -> Inflater | None:
    """None for a body that comes as it is. Raises UnsupportedMediaType for what is neither that nor gzip."""
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower() or PLAIN
    if encoding == PLAIN:
        return None
    if encoding in ("gzip", "x-gzip"):
        return Inflater()
    raise UnsupportedMediaType("send the body as it is, or with `Content-Encoding: gzip`")
