"""What an answer with a body is written to: its head waits for what comes next, so that the two leave together.

uvicorn writes the head by itself, which costs a second system call here, and the client a second reading. Knows nothing
of what an answer is beyond its first bytes. Runs in the API process, on the event loop; one instance per connection.
"""

import asyncio

STATUS_LINE = b"HTTP/1.1 "


class JoinedWrites:
    """The part of a transport that uvicorn's cycle of request and response uses."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Sends `data` with the head that waits for it; a head itself waits till the end of the loop's turn at most."""
        if self._head:
            self._send_with_head(data)
        elif data.startswith(STATUS_LINE):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            self._send_with_head(b"")

    def _send_with_head(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if not self._transport.is_closing():
            self._transport.writelines((head, data))
