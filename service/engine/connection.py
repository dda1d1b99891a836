"""The worker's end of the socket: whole messages in and out, without threads.

Knows frames and nothing of what they mean. `receive` never blocks unless told how long to wait; `send` blocks until the
kernel has taken the frame (the API process always reads). Runs in the worker process.
"""

import os
import select
import socket

from service.engine import protocol
from service.engine.protocol import FromWorker, ToWorker

RECEIVE_BYTES = 1 << 18


class ConnectionLostError(Exception):
    """The API process is gone: there is nobody left to work for."""


class WorkerConnection:
    def __init__(self, endpoint: socket.socket, wake_descriptor: int) -> None:
        """`wake_descriptor` is a pipe's read end: a byte in it ends a wait early (a loader or compiler is done)."""
        endpoint.setblocking(False)
        self._socket = endpoint
        self._wake = wake_descriptor
        self._buffer = bytearray()

    def receive(self, wait_seconds: float) -> list[ToWorker]:
        """All messages that are here, waiting up to `wait_seconds` for the first.

        Raises:
            ConnectionLostError: the other side closed the socket.
        """
        ready, _, _ = select.select([self._socket.fileno(), self._wake], [], [], wait_seconds)
        if self._wake in ready:
            os.read(self._wake, RECEIVE_BYTES)
        while True:
            try:
                chunk = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                break
            if not chunk:
                raise ConnectionLostError
            self._buffer += chunk
            if len(chunk) < RECEIVE_BYTES:
                break
        return [protocol.read_to_worker(body) for body in protocol.take_frames(self._buffer)]

    def send(self, message: FromWorker) -> None:
        view = memoryview(protocol.frame(message))
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                select.select([], [self._socket], [])
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ConnectionLostError from error
