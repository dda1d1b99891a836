"""The worker's lanes without the worker: checkpoints in this process, behind what the application asks of an engine.

For tests that compare what the endpoints say with another implementation's numbers: no sockets, no second process, no
queue. Asking for a result makes the lane's steps.
"""

import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from service.engine.assembly import load_model
from service.engine.flight import EncodeRequest, Flight, GenerateFlight, GenerateRequest, encode_flight, generate_flight
from service.engine.lanes import Lane
from service.engine.ledger import failure_of, too_many_numbers
from service.engine.loading import load_lane
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import Encode, EncodeResult, Generate, TokenOutput, WorkerConfig
from service.model_source import ModelSource
from service.settings import Settings


class LaneStream:
    """What `GenerationStream` is to the tasks."""

    def __init__(self, engine: "LaneEngine", lane: Lane, flight: GenerateFlight) -> None:
        self.timings: Flight = flight
        self.outputs: deque[TokenOutput] = deque()
        self.ended = False
        self._engine, self._lane = engine, lane

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        while not self.ended:
            while not self.outputs:
                self._engine.step(self._lane)
            output = self.outputs.popleft()
            if output.error is not None:
                raise failure_of(output)
            self.ended = output.finish_reason is not None
            yield output

    def cancel(self, outcome: str = "cancelled") -> None:
        if not self.ended:
            self.ended = True
            self._lane.cancel(self.timings.number)
            self._engine.cancelled.append(outcome)


class LaneEngine:
    """Keeps what was asked of the lanes; inputs to read that hold an id of `poison` fail, and they alone."""

    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models = ModelDirectory()
        self.encoded: list[EncodeRequest] = []
        self.generated: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.num_cached: list[int] = []
        """Prompt tokens found in the cache, by each generation that ended."""
        self.poison: set[int] = set()
        self._lanes: dict[str, Lane] = {}
        self._streams: dict[int, LaneStream] = {}
        self._numbers = itertools.count(1)

    def load(self, folder: Path, name: str | None = None, **settings: Any) -> LoadedModel:
        source = ModelSource(name=name or folder.name, location=str(folder), version="1")
        model = load_model(source, Settings(**{"dtype": "float32", "kv_cache_memory": 8 << 20, **settings}))
        config = WorkerConfig(models=[], block_size=4)
        self._lanes[model.key] = load_lane(model.spec, config, lambda done, total: None, lambda: None)
        model.state = "ready"
        self.models[model.name] = model
        return model

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]:
        self.encoded.append(request)
        flight = encode_flight(request, self._model_of(request), next(self._numbers))
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Encode)
        started = time.monotonic()
        lane.submit(message, started)
        while any(result is None for result in flight.results):
            for result in lane.step(time.monotonic()).encoded:
                flight.deliver(result)
            if flight.has_too_many_numbers:
                lane.cancel(flight.number)
                raise too_many_numbers(flight)
        return [self._told(result, request, started) for result in flight.results if result is not None]

    def generate(self, request: GenerateRequest) -> LaneStream:
        self.generated.append(request)
        flight = generate_flight(request, self._model_of(request), next(self._numbers))
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Generate)
        stream = self._streams[flight.number] = LaneStream(self, lane, flight)
        lane.submit(message, time.monotonic())
        return stream

    def step(self, lane: Lane) -> None:
        for output in lane.step(time.monotonic()).tokens:
            self._streams[output.request_id].outputs.append(output)
            if output.finish_reason is not None:
                self.num_cached.append(output.num_cached_tokens)

    def _model_of(self, request: GenerateRequest | EncodeRequest) -> LoadedModel:
        model = self.models.by_key(request.model)
        assert model is not None
        return model

    def _told(self, result: EncodeResult, request: EncodeRequest, started: float) -> EncodeResult:
        result.started = started
        if self.poison & set(request.inputs[result.index].ids):
            result.error, result.data = "a number in the output is not finite", b""
        return result

    async def start(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> None: ...

    async def stop(self) -> None: ...
