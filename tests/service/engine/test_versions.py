"""Versions come and go under load: no request fails, none is answered by two versions, a bad one changes nothing."""

import asyncio
import functools
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from model.batch import SamplingParams
from service.engine.aliases import Alias, sticky_key_context
from service.engine.client import EngineClient
from service.engine.deployment import Deployment
from service.engine.flight import EncodeRequest, GenerateRequest
from service.engine.protocol import EncodeInput
from service.errors import ModelNotFound, SwapFailed
from tests.service.engine.conftest import sample
from tests.service.engine.faults.scripted import NAME, journal, scripted_engine, write_checkpoint

MakeFolder = Callable[..., Path]
MakeScripted = Callable[..., Awaitable[EngineClient]]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    return functools.partial(write_checkpoint, tmp_path)


@pytest.fixture
async def make_scripted() -> AsyncIterator[MakeScripted]:
    """Engines over a worker that does what the checkpoints' folders say; the first version is `m@1`."""
    async with AsyncExitStack() as stack:

        async def make(first: Path, *, head: str = "language_model") -> EngineClient:
            return await stack.enter_async_context(scripted_engine(first, head=head))

        yield make


def deployment(folder: Path, version: str, **more: Any) -> Deployment:
    return Deployment(source=str(folder), version=version, **more)


async def ask(engine: EngineClient, name: str = NAME, *, max_tokens: int = 5, sticky: str = "") -> set[int]:
    """The different ids in one answer: one, if one version gave it."""
    token = sticky_key_context.set(sticky)
    model = engine.resolve(name, "generate")
    sticky_key_context.reset(token)
    await asyncio.sleep(0)  # the time that tokenizing takes
    request = GenerateRequest(model=model.key, prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=max_tokens))
    del model
    ids = [id async for output in engine.generate(request) for id in output.token_ids]
    assert len(ids) == max_tokens
    return set(ids)


async def until(condition: Callable[[], bool]) -> None:
    """Polls; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


class Load:
    """Clients that ask without a pause; `answers` are the sets of ids that they got."""

    def __init__(self, engine: EngineClient, num_clients: int = 8) -> None:
        self.answers: list[set[int]] = []
        self._engine = engine
        self._tasks = [asyncio.ensure_future(self._client()) for _ in range(num_clients)]
        self._stop = False

    async def _client(self) -> None:
        while not self._stop:
            self.answers.append(await ask(self._engine, max_tokens=20))

    async def more(self, num_answers: int) -> None:
        wanted = len(self.answers) + num_answers
        await until(lambda: len(self.answers) >= wanted or any(task.done() for task in self._tasks))

    async def end(self) -> list[set[int]]:
        self._stop = True
        await asyncio.gather(*self._tasks)
        return self.answers


async def test_swapping_under_load_fails_no_request_and_mixes_no_answer_and_frees_the_former(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    folders = [make_folder(token) for token in range(11, 17)]
    engine = await make_scripted(folders[0])
    load = Load(engine)
    for number, folder in enumerate(folders[1:], start=2):
        await load.more(10)
        model = await engine.versions.deploy(NAME, deployment(folder, str(number)))
        assert engine.resolve(NAME, "generate") is model
        assert await ask(engine) == {10 + number}
    await load.more(10)
    answers = await load.end()
    assert all(len(answer) == 1 for answer in answers)
    assert set().union(*answers) >= {11, 16}
    del model
    await until(lambda: not engine.models.retired)
    await until(lambda: all(journal(folder)[-1] == "unloaded" for folder in folders[:-1]))
    assert journal(folders[-1]) == ["loaded"]
    assert list(engine.models) == [NAME]
    assert sample(engine, "slimpajama_model_info") == 1
    accepted, ended = (sample(engine, f"slimpajama_{name}_total") for name in ("requests_accepted", "request_outcomes"))
    assert accepted == ended


async def test_a_request_that_was_given_the_former_version_ends_with_it_however_late_it_is_accepted(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    old, new = make_folder(11), make_folder(12)
    engine = await make_scripted(old)
    bound = engine.resolve(NAME, "generate")
    await engine.versions.deploy(NAME, deployment(new, "2"))
    request = GenerateRequest(model=bound.key, prompt_ids=[1], sampling=SamplingParams(max_tokens=3))
    assert [id async for output in engine.generate(request) for id in output.token_ids] == [11, 11, 11]
    assert journal(old) == ["loaded"]
    del bound, request
    await until(lambda: journal(old) == ["loaded", "unloaded"])
    with pytest.raises(ModelNotFound):
        engine.resolve(f"{NAME}@1", "generate")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"refuse": ""}, "a tensor is missing"),
        ({"golden": json.dumps({"prompt_ids": [1], "expected_ids": [12, 12, 99]})}, "differs from token 2 on"),
        ({"golden": json.dumps([{"prompt_ids": [1], "expected_ids": [12]}, {"input": "a", "logits": [1.0]}])}, "needs"),
        ({"golden": "{"}, "golden.json cannot be read"),
        ({"die": ""}, "the worker died 2 times"),
    ],
    ids=["does-not-load", "golden-differs", "golden-of-another-kind", "golden-unreadable", "kills-the-worker"],
)
async def test_a_version_that_fails_is_refused_with_the_reason_and_the_former_goes_on_serving(
    make_scripted: MakeScripted, make_folder: MakeFolder, files: dict[str, str], reason: str
) -> None:
    old, new = make_folder(11), make_folder(12, **files)
    engine = await make_scripted(old)
    load = Load(engine)
    await load.more(5)
    with pytest.raises(SwapFailed, match=reason):
        await engine.versions.deploy(NAME, deployment(new, "2"))
    assert reason in engine.versions.failures[NAME]
    await load.more(10)
    assert set().union(*await load.end()) == {11}
    await until(lambda: engine.state == "ready")
    assert list(engine.models) == [NAME]
    assert not engine.models.pending
    if "golden" in files:
        await until(lambda: journal(new) == ["loaded", "unloaded"])
    assert sample(engine, "slimpajama_worker_restarts_total") == (2 if "die" in files else 0)


async def test_a_golden_answer_that_is_given_lets_the_version_in(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    engine = await make_scripted(make_folder(11), head="embedding")
    good = make_folder(12, golden=json.dumps({"input": "a", "embedding": [12.001] * 4}))
    bad = make_folder(13, golden=json.dumps({"input": "a", "embedding": [12.5] * 4}))
    await engine.versions.deploy(NAME, deployment(good, "2"))
    with pytest.raises(SwapFailed, match=r"off by 0\.5"):
        await engine.versions.deploy(NAME, deployment(bad, "3"))
    assert engine.resolve(NAME, "embed").version == "2"


async def test_a_version_that_is_being_loaded_neither_serves_nor_makes_the_service_unready(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    old, new = make_folder(11), make_folder(12, slow="")
    engine = await make_scripted(old)
    task = asyncio.ensure_future(engine.versions.deploy(NAME, deployment(new, "2")))
    await until(lambda: bool(engine.models.pending))
    assert engine.state == "ready"
    assert await ask(engine) == {11}
    with pytest.raises(ModelNotFound):
        engine.resolve(f"{NAME}@2", "generate")
    with pytest.raises(SwapFailed, match="is being loaded"):
        await engine.versions.deploy(NAME, deployment(new, "3"))
    (new / "slow").unlink()
    await task
    assert await ask(engine) == {12}


async def test_a_swap_survives_a_death_of_the_worker_and_so_does_every_request(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    old, new = make_folder(11), make_folder(12, slow="")
    engine = await make_scripted(old)
    load = Load(engine)
    await load.more(5)
    task = asyncio.ensure_future(engine.versions.deploy(NAME, deployment(new, "2")))
    await until(lambda: bool(engine.models.pending))
    assert engine.supervisor.worker_pid is not None
    os.kill(engine.supervisor.worker_pid, signal.SIGKILL)
    await until(lambda: engine.state == "restarting")
    await until(lambda: engine.state == "ready")
    await load.more(10)
    assert not task.done()
    (new / "slow").unlink()
    await task
    await load.more(10)
    answers = await load.end()
    assert all(len(answer) == 1 for answer in answers)
    assert answers[-1] == {12}
    assert journal(old)[:2] == ["loaded", "loaded"]
    assert sample(engine, "slimpajama_worker_restarts_total") == 1


async def test_a_canary_gets_its_share_and_each_caller_always_the_same_version(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    engine = await make_scripted(make_folder(11))
    await engine.versions.deploy(NAME, deployment(make_folder(12), "2", switch=False))
    assert await ask(engine) == {11}
    assert await ask(engine, f"{NAME}@2") == {12}
    engine.versions.divide(NAME, {"1": 80, "2": 20})
    first = [await ask(engine, sticky=f"caller-{number}", max_tokens=1) for number in range(200)]
    again = [await ask(engine, sticky=f"caller-{number}", max_tokens=1) for number in range(200)]
    assert first == again
    assert 20 <= first.count({12}) <= 60
    engine.versions.divide(NAME, {"2": 1})
    assert await ask(engine) == {12}
    assert await ask(engine, f"{NAME}@1") == {11}


def test_weights_are_shares_of_the_callers() -> None:
    alias = Alias({"a": 3.0, "b": 1.0, "c": 0.0})
    picks = [alias.pick("m", f"caller-{number}") for number in range(4000)]
    assert picks.count("b") == pytest.approx(1000, abs=120)
    assert "c" not in picks
    assert Alias({"a": 0.0, "b": 0.5}).pick("m", "x") == "b"


async def test_a_shadow_runs_each_request_again_and_counts_what_differs_and_the_caller_sees_nothing_of_it(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    engine = await make_scripted(make_folder(11))
    twin, other = make_folder(99), make_folder(12)
    (twin / "token").write_text("11")
    for version, folder in (("2", twin), ("3", other)):
        await engine.versions.deploy(NAME, deployment(folder, version, switch=False))
    engine.versions.divide(NAME, {"1": 1}, shadow="2")
    for _ in range(3):
        assert await ask(engine) == {11}
    await until(lambda: engine.num_in_flight == 0)
    assert shadowed(engine) == {("2", "same"): 3}
    engine.versions.divide(NAME, {"1": 1}, shadow="3")
    for _ in range(2):
        assert await ask(engine) == {11}
    await until(lambda: engine.num_in_flight == 0)
    assert shadowed(engine) == {("2", "same"): 3, ("3", "different"): 2}
    request = GenerateRequest(model=f"{NAME}@1", prompt_ids=[1], sampling=SamplingParams(max_tokens=100_000))
    stream = engine.generate(request)
    await stream.__anext__()
    stream.cancel()
    assert engine.num_in_flight == 0
    assert shadowed(engine)["3", "different"] == 2


async def test_a_shadow_of_embeddings_is_compared_within_a_tolerance(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    engine = await make_scripted(make_folder(11), head="embedding")
    await engine.versions.deploy(NAME, deployment(make_folder(12), "2", switch=False))
    engine.versions.divide(NAME, {"1": 1}, shadow="2")
    await engine.encode(EncodeRequest(model=f"{NAME}@1", output="embedding", inputs=[EncodeInput(ids=[1])]))
    await until(lambda: engine.num_in_flight == 0)
    assert shadowed(engine) == {("2", "different"): 1}


def shadowed(engine: EngineClient) -> dict[tuple[str, str], float]:
    return {
        (entry.labels["version"], entry.labels["outcome"]): entry.value
        for metric in engine._books.metrics.registry.collect()
        for entry in metric.samples
        if entry.name == "slimpajama_shadow_requests_total"
    }


async def test_one_rollback_brings_the_former_version_back_and_a_second_one_goes_forward_again(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    old, new = make_folder(11), make_folder(12)
    engine = await make_scripted(old)
    with pytest.raises(SwapFailed, match="nothing else before"):
        await engine.versions.rollback(NAME)
    await engine.versions.deploy(NAME, deployment(new, "2"))
    await until(lambda: journal(old)[-1] == "unloaded")
    assert await engine.versions.rollback(NAME) == {"1": 1.0}
    assert await ask(engine) == {11}
    assert await engine.versions.rollback(NAME) == {"2": 1.0}
    assert await ask(engine) == {12}


async def test_a_rollback_takes_back_a_version_that_is_still_in_use_without_loading_it_again(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    old, new = make_folder(11), make_folder(12)
    engine = await make_scripted(old)
    held = engine.resolve(NAME, "generate")
    await engine.versions.deploy(NAME, deployment(new, "2"))
    await engine.versions.rollback(NAME)
    assert engine.resolve(NAME, "generate") is held
    assert held.state == "ready"
    assert await ask(engine) == {11}
    assert journal(old) == ["loaded"]


async def test_a_version_with_a_share_and_the_last_checkpoint_cannot_be_removed(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    old, new = make_folder(11), make_folder(12)
    engine = await make_scripted(old)
    with pytest.raises(SwapFailed, match="last checkpoint"):
        engine.versions.remove(NAME)
    await engine.versions.deploy(NAME, deployment(new, "2", switch=False))
    with pytest.raises(SwapFailed, match="share"):
        engine.versions.remove(f"{NAME}@1")
    engine.versions.remove(f"{NAME}@2")
    await until(lambda: journal(new) == ["loaded", "unloaded"])
    with pytest.raises(ModelNotFound):
        engine.versions.remove(f"{NAME}@2")


async def test_a_name_that_stands_for_another_cannot_be_deployed_and_follows_what_it_stands_for(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    engine = await make_scripted(make_folder(11))
    engine.models.other_names["gpt-4o"] = NAME
    assert engine.resolve("gpt-4o", "generate").version == "1"
    with pytest.raises(SwapFailed, match=f"another name of '{NAME}'"):
        await engine.versions.deploy("gpt-4o", deployment(make_folder(12), "2"))
    await engine.versions.deploy(NAME, deployment(make_folder(13), "3"))
    assert engine.resolve("gpt-4o", "generate").version == "3"
    assert list(engine.models.names()) == [NAME, "gpt-4o"]


async def test_a_deployment_goes_on_when_the_one_who_asked_for_it_leaves(
    make_scripted: MakeScripted, make_folder: MakeFolder
) -> None:
    engine = await make_scripted(make_folder(11))
    new = make_folder(12, slow="")
    task = asyncio.ensure_future(engine.versions.deploy(NAME, deployment(new, "2")))
    await until(lambda: bool(engine.models.pending))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    (new / "slow").unlink()
    await until(lambda: engine.models[NAME].version == "2")
    assert await ask(engine) == {12}
