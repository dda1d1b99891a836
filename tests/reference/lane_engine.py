"""The worker's lanes without the worker: checkpoints in this process, behind what the application asks of an engine.

For tests that compare what the endpoints say with another implementation's numbers: no sockets, no second process, no
queue. Asking for a result makes the lane's steps. Single-pass work alone.
"""

import itertools
import time
from pathlib import Path

from model.description import describe
from model.tokenizer import Tokenizer
from service.engine.flight import EncodeFlight, EncodeRequest
from service.engine.lanes import Lane
from service.engine.loading import load_lane
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import Encode, EncodeResult, ModelSpec, WorkerConfig


class LaneEngine:
    """Keeps what was asked of the lanes in `encoded`; inputs that hold an id of `poison` fail, and they alone."""

    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models = ModelDirectory()
        self.encoded: list[EncodeRequest] = []
        self.poison: set[int] = set()
        self._lanes: dict[str, Lane] = {}
        self._numbers = itertools.count(1)

    def load(self, folder: Path, name: str | None = None) -> LoadedModel:
        name = name or folder.name
        spec = ModelSpec(key=f"{name}@1", folder=str(folder), dtype="float32", kv_cache_bytes=1 << 20)
        config = WorkerConfig(models=[], block_size=4)
        self._lanes[spec.key] = load_lane(spec, config, lambda done, total: None, lambda: None)
        self.models[name] = LoadedModel(
            name=name, version="1", spec=spec, description=describe(folder), tokenizer=Tokenizer.load(folder),
            chat_template=None, state="ready",
        )  # fmt: skip
        return self.models[name]

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]:
        self.encoded.append(request)
        accepted = time.monotonic()
        flight = EncodeFlight(
            request=request, results=[None] * len(request.inputs), number=next(self._numbers),
            model=self.models.by_key(request.model), task=request.task, client="", priority=0, cost_tokens=0,
            num_prompt_tokens=0, accepted=accepted, deadline=request.deadline,
        )  # fmt: skip
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Encode)
        started = time.monotonic()
        lane.submit(message, started)
        while any(result is None for result in flight.results):
            for result in lane.step(time.monotonic()).encoded:
                flight.deliver(result)
        return [self._told(result, request, started) for result in flight.results if result is not None]

    def _told(self, result: EncodeResult, request: EncodeRequest, started: float) -> EncodeResult:
        result.started = started
        if self.poison & set(request.inputs[result.index].ids):
            result.error, result.data = "a number in the output is not finite", b""
        return result

    async def start(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> None: ...

    async def stop(self) -> None: ...
