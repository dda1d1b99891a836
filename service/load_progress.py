"""Shows how far loading is: a bar on a terminal, a log line per tenth otherwise.

Knows only the worker's `Loading` messages. Runs in the API process, on the event loop.
"""

import logging
import sys
from typing import NoReturn

from tqdm import tqdm

from service.engine.protocol import Loading

log = logging.getLogger(__name__)


class LoadProgress:
    """Call it with each message; a checkpoint is done when all its bytes are."""

    def __init__(self, *, on_terminal: bool | None = None) -> None:
        self._on_terminal = sys.stderr.isatty() if on_terminal is None else on_terminal
        self._bars: dict[str, tqdm[NoReturn]] = {}
        self._tenths: dict[str, int] = {}

    def __call__(self, message: Loading) -> None:
        if self._on_terminal:
            self._draw(message)
        else:
            self._log(message)

    def _draw(self, message: Loading) -> None:
        bar = self._bars.get(message.model)
        if bar is None:
            bar = tqdm(total=message.total_bytes, desc=message.model, unit="B", unit_scale=True, unit_divisor=1024)
            self._bars[message.model] = bar
        bar.update(message.done_bytes - bar.n)
        if message.done_bytes >= message.total_bytes:
            bar.close()
            del self._bars[message.model]

    def _log(self, message: Loading) -> None:
        tenth = 10 * message.done_bytes // max(message.total_bytes, 1)
        if tenth != self._tenths.get(message.model):
            self._tenths[message.model] = tenth
            fields = {"model": message.model, "done_bytes": message.done_bytes, "total_bytes": message.total_bytes}
            log.info("loading", extra={**fields, "percent": 10 * tenth})
