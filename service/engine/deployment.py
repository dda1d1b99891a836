"""What an administrator asks for when a version is deployed, and what the engine is to whoever does it.

Data and protocols alone. API process only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import ToWorker
from service.engine.self_test import SelfTestEngine
from service.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What to load and what to do with it; None: as the service is configured."""

    source: str
    version: str | None = None
    adapter: bool = False
    """It shares the weights of its base, which is served; dtype and the like are that one's."""
    draft: str | None = None
    """What guesses its tokens: a folder, GGUF file or hub name; empty: nothing does."""
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_memory: int | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None
    warm_up: bool = True
    self_test: bool = True
    switch: bool = True
    """False: it is served beside the others, under `name@version` alone."""
    keep_former: bool = False
    """Leave the replaced version loaded, under its `name@version`."""
    in_place: bool = False
    """Where this very version is served already, it is the answer; else that is refused."""


Prepare = Callable[[str, Deployment, ModelDirectory], LoadedModel]
"""Finds, describes and tokenizes a checkpoint for a name, beside those that are served; on a thread. Raises
CheckpointError or ValueError."""


class Sender(Protocol):
    def send(self, message: ToWorker) -> None: ...


class Owner(SelfTestEngine, Protocol):
    """What the engine client is to its versions."""

    models: ModelDirectory

    @property
    def state(self) -> str: ...

    @property
    def supervisor(self) -> Sender: ...

    def num_requests_of(self, key: str) -> int: ...

    def fail_requests_of(self, key: str, error: ServiceError) -> None: ...

    def unload(self, name: str, version: str, key: str) -> None: ...
