"""A small asynchronous HTTP/1.1 client whose own cost stays out of what it measures.

One connection, kept alive, a request at a time; the body is handed over as it arrives. Parsing is httptools' (the
parser of uvicorn). Knows nothing of what is asked. Runs in the benchmark's process.
"""

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

import httptools


class BenchHTTPError(Exception):
    """The server answered with an error status, or not with HTTP at all."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _Response:
    """Callbacks of httptools' parser."""

    def __init__(self, on_body: Callable[[bytes], None]) -> None:
        self.on_body = on_body
        self.complete = False


class Connection:
    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._url: SplitResult = urlsplit(url)
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: bytes, on_body: Callable[[bytes], None]) -> None:
        """Sends `body` and calls `on_body` with each piece of the answer.

        Raises:
            BenchHTTPError: the status is not 200, or the server closed the connection early.
        """
        request = (
            f"POST {self._url.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{self._headers}\r\n"
        )
        reader, writer = await self._connect()
        writer.write(request.encode() + body)
        pieces: list[bytes] = []
        response = _Response(pieces.append)
        parser = httptools.HttpResponseParser(_Callbacks(response))
        try:
            while not response.complete:
                chunk = await reader.read(1 << 16)
                if not chunk:
                    raise BenchHTTPError("the server closed the connection before the answer was complete")
                try:
                    parser.feed_data(chunk)
                except httptools.HttpParserError as error:
                    raise BenchHTTPError(f"the server does not speak HTTP: {error}") from error
                if parser.get_status_code() == 200:
                    for piece in pieces:
                        on_body(piece)
                    pieces.clear()
        except BaseException:
            self.close()
            raise
        if not parser.should_keep_alive():
            self.close()
        if parser.get_status_code() != 200:
            raise BenchHTTPError(b"".join(pieces).decode(errors="replace")[:300], parser.get_status_code())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None

    async def aclose(self) -> None:
        writer = self._writer
        self.close()
        if writer is not None:
            await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            secure = self._url.scheme == "https"
            port = self._url.port or (443 if secure else 80)
            context = ssl.create_default_context() if secure else None
            self._reader, self._writer = await asyncio.open_connection(self._url.hostname, port, ssl=context)
        return self._reader, self._writer


class _Callbacks:
    def __init__(self, response: _Response) -> None:
        self.on_body = response.on_body
        self._response = response

    def on_message_complete(self) -> None:
        self._response.complete = True
