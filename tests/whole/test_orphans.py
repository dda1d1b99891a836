"""No worker outlives the service, however early or late that is killed."""

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest

from tests.whole.conftest import STORIES, MakeService, start


async def ended(process: psutil.Process) -> None:
    """Polls; the test's own time limit bounds it. Whoever adopts the orphan may be slow to bury it."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("under_load", [False, True])
async def test_the_worker_ends_with_a_service_that_is_killed(
    make_service: MakeService, cases: list[dict[str, Any]], under_load: bool
) -> None:
    service = await make_service()
    worker = service.worker
    request: asyncio.Future[Any] | None = None
    if under_load:
        body = {"prompt": "Once upon a time", "max_tokens": 450, "ignore_eos": True}
        request = asyncio.ensure_future(service.client.post("/v1/completions", json=body))
        while await service.metric("generated_tokens_total") < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    service.process.kill()
    await ended(worker)
    if request is not None:
        await asyncio.gather(request, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5])
async def test_a_worker_that_is_still_starting_or_loading_ends_too(seconds: float) -> None:
    """At 0 s it has not run a line of its own yet, later it imports and loads."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K checkpoint is not in ../shared/data")
    process: subprocess.Popen[str] = start(
        [sys.executable, "-m", "service", "serve", "--port", "0", "--model", str(STORIES), "--log-level", "error"]
    )
    try:
        while not (children := psutil.Process(process.pid).children()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(seconds)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.communicate)
    for child in children:
        await ended(child)
