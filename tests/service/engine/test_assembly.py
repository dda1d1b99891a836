"""From settings to messages: whatever they are, the worker can be told, and a fault in telling is not silent."""

import asyncio
from pathlib import Path

import pytest

from service.engine import protocol
from service.engine.assembly import load_directory
from service.engine.protocol import WorkerConfig
from service.engine.supervisor import Supervisor, SupervisorLimits
from service.settings import Settings

STORIES = Path(__file__).parents[4] / "shared/data/stories260K-hf"


def test_what_the_settings_say_of_the_cache_can_be_sent() -> None:
    """A pydantic ByteSize is an int that msgspec refuses: the service once waited for ever for its worker."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K checkpoint is not in ../shared/data")
    settings = Settings(model=(f"{STORIES}=stories",), kv_cache_memory="64MiB", kv_cache_dtype="int8")
    directory = load_directory(settings)
    specs = [model.spec for model in directory.values()]
    frame = protocol.frame(WorkerConfig(models=specs))
    found = protocol.read_to_worker(frame[protocol.HEADER_BYTES :])
    assert isinstance(found, WorkerConfig)
    assert (found.models[0].kv_cache_bytes, found.models[0].kv_cache_dtype) == (64 << 20, "int8")


class Events:
    def __init__(self) -> None:
        self.gave_up = asyncio.Event()

    def on_message(self, message: object) -> None: ...

    def on_worker_down(self, cause: str, batch: frozenset[int] | None) -> None: ...

    def on_budget_spent(self) -> None:
        self.gave_up.set()


async def test_a_supervisor_that_fails_says_so() -> None:
    def config() -> WorkerConfig:
        raise TypeError("this cannot be told to a worker")

    events = Events()
    supervisor = Supervisor(config, events, SupervisorLimits())
    supervisor.start()
    await asyncio.wait_for(events.gave_up.wait(), 60)
    await supervisor.stop()
