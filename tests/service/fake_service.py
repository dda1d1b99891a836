"""A process to send signals to: the real server and application around an engine that holds a request until told.

Started by `test_server.py`, which reads its log ("listening", "held" for each request, "stopped"). It takes orders, a
line each, on its standard input: `finish` ends the held requests, `fail` fails the engine for good.
"""

import asyncio
import json
import logging
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from service import logs
from service.app import create_app
from service.errors import Unavailable
from service.server import serve
from service.settings import Settings

log = logging.getLogger(__name__)


class HoldingEngine:
    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models: dict[str, Any] = {}
        self.held = 0
        self.release = asyncio.Event()
        self.empty = asyncio.Event()
        self.empty.set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._take_orders, args=(loop,), daemon=True).start()

    async def drain(self, timeout_seconds: float) -> None:
        self.state = "draining"
        try:
            await asyncio.wait_for(self.empty.wait(), timeout_seconds)
        except TimeoutError:
            self.release.set()

    async def stop(self) -> None:
        log.info("stopped")

    async def hold(self) -> AsyncIterator[bytes]:
        self.held += 1
        self.empty.clear()
        try:
            log.info("held")
            yield b"begun "
            await self.release.wait()
            yield b"done"
        finally:
            self.held -= 1
            if not self.held:
                self.empty.set()

    def _take_orders(self, loop: asyncio.AbstractEventLoop) -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(self._obey, line.strip())

    def _obey(self, order: str) -> None:
        if order == "fail":
            self.state = "failed"
        else:
            self.release.set()


def main() -> int:
    engine = HoldingEngine()
    settings = Settings(port=0, **json.loads(sys.argv[1]))
    logs.configure("json", "info", sys.stdout)
    app = create_app(settings, engine)  # type: ignore[arg-type]

    @app.post("/v1/hold")
    async def hold() -> StreamingResponse:
        if engine.state != "ready":
            raise Unavailable("the engine takes nothing now")
        return StreamingResponse(engine.hold())

    return serve(settings, app)


if __name__ == "__main__":
    raise SystemExit(main())
