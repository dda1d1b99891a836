"""A real engine on real weights: worker processes, sockets, signals."""

import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from model.batch import SamplingParams
from model.description import describe
from model.tokenizer import Tokenizer
from service.admission import QueueLimits
from service.engine.accounting import Accounting
from service.engine.client import EngineClient, GenerationStream
from service.engine.flight import GenerateRequest
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import ModelSpec, WorkerConfig
from service.engine.supervisor import SupervisorLimits
from service.metrics import Metrics

DATA = Path(__file__).parents[4] / "shared/data"
STORIES = DATA / "stories260K-hf"
ENCODER = Path(__file__).parents[3] / "checkpoints/slimpajama-tiny-encoder"
FAULTY_WORKER = Path(__file__).parent / "faults/faulty_worker.py"
KEY, ENCODER_KEY = "stories@1", "encoder@1"

MakeEngine = Callable[..., Awaitable[EngineClient]]


def load_encoder() -> LoadedModel:
    return LoadedModel(
        name="encoder",
        version="1",
        spec=ModelSpec(key=ENCODER_KEY, folder=str(ENCODER), dtype="float32"),
        description=describe(ENCODER),
        tokenizer=Tokenizer.load(ENCODER),
        chat_template=None,
    )


def load_stories(*, kv_cache_bytes: int = 8 << 20, dtype: Literal["float32", "bfloat16"] = "float32") -> ModelDirectory:
    model = LoadedModel(
        name="stories",
        version="1",
        spec=ModelSpec(key=KEY, folder=str(STORIES), dtype=dtype, kv_cache_bytes=kv_cache_bytes),
        description=describe(STORIES),
        tokenizer=Tokenizer.load(STORIES),
        chat_template=None,
    )
    return ModelDirectory({"stories": model})


@pytest.fixture
async def make_engine() -> AsyncIterator[MakeEngine]:
    """Makes engines that are ready; stops them after the test."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K checkpoint is not in ../shared/data")
    engines: list[EngineClient] = []

    async def make(
        *,
        limits: dict[str, Any] | None = None,
        faulty: bool = False,
        queue: QueueLimits | None = None,
        encoder: bool = False,
        **config: Any,
    ) -> EngineClient:
        """`encoder`: with the shipped encoder beside the language model."""
        directory = load_stories(
            kv_cache_bytes=config.pop("kv_cache_bytes", 8 << 20), dtype=config.pop("dtype", "float32")
        )
        if encoder:
            directory["encoder"] = load_encoder()
        settings = {"step_timeout_seconds": 20.0} | (limits or {})
        if faulty:
            settings["command"] = (sys.executable, str(FAULTY_WORKER))
        engine = EngineClient(
            lambda: directory,
            WorkerConfig(models=[], num_threads=1, **config),
            SupervisorLimits(**settings),
            accounting=Accounting(Metrics(), queue or QueueLimits(1000, 10_000_000), time.monotonic()),
        )
        engines.append(engine)
        await engine.start()
        await engine.wait_ready()
        return engine

    yield make
    for engine in engines:
        await engine.stop()


@pytest.fixture(scope="session")
def reference_cases() -> list[dict[str, Any]]:
    path = DATA / "reference-outputs/greedy_transformers_cpu_fp32.json"
    if not path.is_file():
        pytest.skip("the reference outputs are not in ../shared/data")
    cases: list[dict[str, Any]] = json.loads(path.read_text())["models"]["stories260K-hf"]["cases"]
    return cases


def submit(
    engine: EngineClient, prompt_ids: list[int], *, deadline: float | None = None, client: str = "", **sampling: Any
) -> GenerationStream:
    params = SamplingParams(**({"max_tokens": 60} | sampling))
    return engine.generate(
        GenerateRequest(model=KEY, prompt_ids=prompt_ids, sampling=params, deadline=deadline, client=client)
    )


async def read_ids(stream: GenerationStream) -> list[int]:
    ids: list[int] = []
    async for output in stream:
        ids += output.token_ids
    return ids


def sample(engine: EngineClient, name: str) -> float:
    """The sum over all labels of one metric, like `slimpajama_requests_replayed_total`."""
    return sum(
        entry.value
        for metric in engine._books.metrics.registry.collect()
        for entry in metric.samples
        if entry.name == name
    )
