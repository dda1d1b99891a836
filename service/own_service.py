"""A service that is started for a while on this machine: by `slimpajama batch`, and by the tools that measure it."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

PAUSE_SECONDS = 0.01


class ServiceEndedError(Exception):
    """It has ended before it was ready."""


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """When it is ready, its address and its process; it ends with the block. Raises: ServiceEndedError."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "serve", *flags, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "warning"])
    try:
        while not _is_ready(url):
            if process.poll() is not None:
                raise ServiceEndedError(f"the service has ended with {process.returncode}")
            time.sleep(PAUSE_SECONDS)
        yield url, process
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz"):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
