"""Adapters over one base in the engine: in one batch as alone, with blocks of their own, replayed after a death."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from model.batch import SamplingParams
from model.ops import library
from service.admission import QueueLimits
from service.engine.accounting import Accounting
from service.engine.adapter_loading import load_adapter
from service.engine.assembly import load_directory
from service.engine.cache_budget import Neighbours
from service.engine.client import EngineClient
from service.engine.flight import GenerateRequest
from service.engine.generation_lane import GenerationLane
from service.engine.loading import load_lane
from service.engine.models import ModelDirectory
from service.engine.protocol import Generate, WorkerConfig
from service.engine.supervisor import SupervisorLimits
from service.metrics import Metrics
from tests.service.engine.conftest import read_ids, sample
from tests.service.engine.shared_adapters import settings_of, write_folders

PROMPTS = [[10, 500, 77, 1200, 310, 42], [5, 9, 300], list(range(40, 77))]
NUM_TOKENS = 20
CONFIG = WorkerConfig(models=[], block_size=16, num_threads=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("shared"))


def lane_of(directory: ModelDirectory) -> GenerationLane:
    """The base's lane with all adapters, in this process."""
    specs = [model.spec for model in directory.values()]
    lane = load_lane(specs[0], CONFIG, lambda done, total: None, lambda: None)
    assert isinstance(lane, GenerationLane)
    for spec in specs[1:]:
        lane.add_adapter(spec.key, load_adapter(spec, CONFIG).weights)
    return lane


class Lane:
    """A lane, and requests to its base or, by name, to one of its adapters."""

    def __init__(self, directory: ModelDirectory) -> None:
        self.directory = directory
        self.lane = lane_of(directory)
        self.ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.cached: dict[int, int] = {}

    def submit(self, name: str, prompt_ids: list[int]) -> int:
        number, model = len(self.ids) + 1, self.directory[name]
        message = Generate(
            request_id=number,
            model=model.lane_key,
            adapter="" if model.base is None else model.key,
            prompt_ids=prompt_ids,
            sampling=SamplingParams(max_tokens=NUM_TOKENS, logprobs=0),
        )
        self.ids[number], self.logprobs[number] = [], []
        self.lane.submit(message, time.monotonic())
        return number

    def step(self) -> None:
        for output in self.lane.step(time.monotonic()).tokens:
            assert output.error is None
            self.ids[output.request_id] += output.token_ids
            self.logprobs[output.request_id] += [entry.logprob for entry in output.logprobs]
            self.cached[output.request_id] = output.num_cached_tokens

    def finish(self) -> None:
        while self.lane.has_work:
            self.step()

    def alone(self, name: str, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        number = self.submit(name, prompt_ids)
        self.finish()
        return self.ids[number], self.logprobs[number]


WANTED = ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "int4"})


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(folders: dict[str, Path], wanted: dict[str, Any]) -> None:
    """Log-probabilities, too: to a bit where the operators multiply."""
    if "quantization" in wanted and not library.LOADED:
        pytest.skip("the operators were not compiled (no C++ compiler?)")
    lane = Lane(load_directory(settings_of(folders, prefix_caching=False, **wanted)))
    asked = [(name, prompt) for prompt in PROMPTS for name in ("one", "base", "two", "one")]
    expected = [lane.alone(name, prompt) for name, prompt in asked]
    numbers = []
    for name, prompt in asked:
        numbers.append(lane.submit(name, prompt))
        lane.step()  # they come one by one, so that prompts are computed beside what decodes
    lane.finish()
    exact = library.LOADED and wanted != {"dtype": "float32"}
    for number, (ids, logprobs) in zip(numbers, expected, strict=True):
        assert lane.ids[number] == ids
        assert lane.logprobs[number] == (logprobs if exact else pytest.approx(logprobs, abs=1e-4))
    assert len({tuple(ids) for ids, _ in expected[:3]}) == 3


def test_it_generates_the_tokens_of_the_merged_checkpoint(folders: dict[str, Path]) -> None:
    lane = Lane(load_directory(settings_of(folders, dtype="float32")))
    merged = Lane(load_directory(settings_of(folders, model=(f"{folders['merged']}=merged",), adapter=())))
    for prompt in PROMPTS:
        assert lane.alone("one", prompt)[0] == merged.alone("merged", prompt)[0]


def test_blocks_are_shared_by_requests_of_one_adapter_alone(folders: dict[str, Path]) -> None:
    lane = Lane(load_directory(settings_of(folders)))
    prompt = list(range(100, 165))
    cached = []
    for name in ("base", "one", "two", "one", "base", "two"):
        number = lane.submit(name, prompt)
        lane.finish()
        cached.append(lane.cached[number])
    assert cached == [0, 0, 0, 64, 64, 64]


def test_blocks_of_an_adapter_that_was_replaced_are_not_found(folders: dict[str, Path]) -> None:
    """By another one under the same key, as when a version's label is given again."""
    lane = Lane(load_directory(settings_of(folders)))
    key, prompt = lane.directory["one"].key, list(range(100, 165))
    before = lane.alone("one", prompt)[0]
    lane.lane.drop_adapter(key)
    other = load_adapter(lane.directory["two"].spec, CONFIG)
    lane.lane.add_adapter(key, other.weights)
    assert lane.alone("one", prompt)[0] == lane.alone("two", prompt)[0] != before


def test_an_adapter_that_is_dropped_fails_what_is_left_of_its_requests(folders: dict[str, Path]) -> None:
    lane = Lane(load_directory(settings_of(folders)))
    numbers = [lane.submit(name, PROMPTS[0]) for name in ("one", "two", "base")]
    lane.step()
    step = lane.lane.drop_adapter(lane.directory["one"].key)
    assert [(output.request_id, output.finish_reason) for output in step.tokens] == [(numbers[0], "error")]
    lane.finish()
    assert [len(lane.ids[number]) for number in numbers[1:]] == [NUM_TOKENS] * 2
    with pytest.raises(ValueError, match=r"adapter 'one@.*' is not loaded"):
        lane.submit("one", PROMPTS[0])


def test_rows_of_one_adapter_are_side_by_side_in_a_step(folders: dict[str, Path]) -> None:
    """So that each adapter's weights are read once a step, for all of its rows."""
    lane = Lane(load_directory(settings_of(folders)))
    for place, name in enumerate(("two", "one", "base", "two", "base", "one")):
        lane.submit(name, [10 + place, 20, 30])
    batch = lane.lane._scheduler.schedule(time.monotonic())
    assert [row.adapter for row in batch.rows] == [None, None, 1, 1, 2, 2]
    assert [row.prompt_ids[0] for row in batch.rows] == [12, 14, 11, 15, 10, 13]


def test_adapters_have_no_cache_of_their_own_and_need_room_for_their_weights(folders: dict[str, Path]) -> None:
    specs = [model.spec for model in load_directory(settings_of(folders)).values()]
    files = [folders[name] / "adapter_model.safetensors" for name in ("one", "two")]
    beside = Neighbours.of(specs, 0)
    assert len(beside.later) == 2
    assert beside.cpu_share() == Neighbours().cpu_share()
    assert beside.gpu_share(1 << 30) == (1 << 30) - 2 * sum(file.stat().st_size for file in files)


@pytest.fixture
async def engine(folders: dict[str, Path]) -> AsyncIterator[EngineClient]:
    made = EngineClient(
        lambda: load_directory(settings_of(folders)),
        CONFIG,
        SupervisorLimits(),
        accounting=Accounting(Metrics(), QueueLimits(1000, 10_000_000), time.monotonic()),
    )
    await made.start()
    await made.wait_ready()
    yield made
    await made.stop()


async def test_a_worker_that_is_killed_costs_nobody_a_token(engine: EngineClient) -> None:
    names = ["one", "base", "two"] * 4
    requests = [
        GenerateRequest(
            model=engine.models[name].key,
            prompt_ids=PROMPTS[place // 3 % 3],
            sampling=SamplingParams(max_tokens=60, temperature=0.8, seed=place // 3),
        )
        for place, name in enumerate(names)
    ]
    expected = [await read_ids(engine.generate(request)) for request in requests]
    streams = [asyncio.ensure_future(read_ids(engine.generate(request))) for request in requests]
    await asyncio.sleep(0.05)
    assert engine.supervisor._worker is not None
    assert not any(stream.done() for stream in streams)
    engine.supervisor._worker.kill()
    assert await asyncio.wait_for(asyncio.gather(*streams), 60) == expected
    assert len({tuple(ids) for ids in expected}) == len(expected)
    assert sample(engine, "slimpajama_worker_restarts_total") == 1
