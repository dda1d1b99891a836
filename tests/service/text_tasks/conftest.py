"""The worker's lanes in this process, over the tiny checkpoints of `tests/reference`, behind the application."""

import itertools
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_checkpoints import make

from service.app import create_app
from service.engine.assembly import load_model
from service.engine.flight import EncodeFlight, EncodeRequest, Flight, GenerateFlight, GenerateRequest
from service.engine.lanes import Lane
from service.engine.loading import load_lane
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import Encode, EncodeResult, Generate, TokenOutput, WorkerConfig
from service.errors import GenerationFailed
from service.model_source import ModelSource
from service.settings import Settings

RECORDED = Path(__file__).parents[2] / "reference" / "pipelines.json"


class Stream:
    """What `GenerationStream` is to the tasks; asking for more makes the lane's steps."""

    def __init__(self, engine: "LaneEngine", lane: Lane, flight: GenerateFlight) -> None:
        self.timings: Flight = flight
        self.outputs: deque[TokenOutput] = deque()
        self.ended = False
        self._engine, self._lane, self._number = engine, lane, flight.number

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        while not self.ended:
            while not self.outputs:
                self._engine.step(self._lane)
            output = self.outputs.popleft()
            if output.error is not None:
                raise GenerationFailed(output.error)
            self.ended = output.finish_reason is not None
            yield output

    def cancel(self, outcome: str = "cancelled") -> None:
        if not self.ended:
            self.ended = True
            self._lane.cancel(self._number)
            self._engine.cancelled.append(outcome)


class LaneEngine:
    """The engine by what tasks and application ask of it; keeps what was asked of the lanes."""

    alive = True

    def __init__(self) -> None:
        self.state = "ready"
        self.models = ModelDirectory()
        self.encoded: list[EncodeRequest] = []
        self.generated: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self._lanes: dict[str, Lane] = {}
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)

    def load(self, folder: Path, name: str | None = None, **settings: Any) -> LoadedModel:
        source = ModelSource(name=name or folder.name, location=str(folder), version="1")
        chosen = Settings(dtype="float32", kv_cache_memory=8 << 20, **settings)
        model = load_model(source, chosen)
        model.state = "ready"
        self._lanes[model.key] = load_lane(
            model.spec, WorkerConfig(models=[], block_size=4), lambda done, total: None, lambda: None
        )
        self.models[model.name] = model
        return model

    def resolve(self, name: str | None, task: str) -> LoadedModel:
        return self.models.resolve(name, task)

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]:
        self.encoded.append(request)
        flight = EncodeFlight(request=request, results=[None] * len(request.inputs), **self._common(request))
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Encode)
        lane.submit(message, time.monotonic())
        while any(result is None for result in flight.results):
            for result in lane.step(time.monotonic()).encoded:
                flight.deliver(result)
        return [result for result in flight.results if result is not None]

    def generate(self, request: GenerateRequest) -> Stream:
        self.generated.append(request)
        flight = GenerateFlight(request=request, **self._common(request))
        lane, message = self._lanes[request.model], flight.message()
        assert isinstance(message, Generate)
        stream = self._streams[flight.number] = Stream(self, lane, flight)
        lane.submit(message, time.monotonic())
        return stream

    def step(self, lane: Lane) -> None:
        for output in lane.step(time.monotonic()).tokens:
            self._streams[output.request_id].outputs.append(output)

    def _common(self, request: GenerateRequest | EncodeRequest) -> dict[str, Any]:
        model = self.models.by_key(request.model)
        return {
            "number": next(self._numbers), "model": model, "task": request.task, "client": "", "priority": 0,
            "cost_tokens": 0, "num_prompt_tokens": 0, "accepted": time.monotonic(), "deadline": request.deadline,
        }  # fmt: skip

    async def start(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> None: ...

    async def stop(self) -> None: ...


@pytest.fixture
def engine() -> LaneEngine:
    return LaneEngine()


Load = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(name): the folder of a tiny checkpoint, made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: root / name if (root / name).is_dir() else make(name, root / name)


@pytest.fixture
def load(engine: LaneEngine, checkpoint: Callable[[str], Path]) -> Load:
    """load(name): a tiny checkpoint in the engine."""
    return lambda name, **settings: engine.load(checkpoint(name), **settings)


@pytest.fixture
async def client(engine: LaneEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(), engine)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


Post = Callable[..., Any]


@pytest.fixture
def post(client: httpx.AsyncClient) -> Post:
    """await post(path, **body): the answer to a request that must succeed."""

    async def send(path: str, **body: Any) -> dict[str, Any]:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    return send


@pytest.fixture
def refused(client: httpx.AsyncClient) -> Post:
    """await refused(path, **body): the error of a request that is the caller's fault."""

    async def send(path: str, **body: Any) -> dict[str, Any]:
        response = await client.post(path, json=body)
        assert 400 <= response.status_code < 500, response.text
        error: dict[str, Any] = response.json()["error"]
        return error

    return send


@pytest.fixture(scope="session")
def recorded() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]
    return cases
