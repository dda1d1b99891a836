"""Versions whose key is given again, and adapters' over bases that come and go."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.batch import SamplingParams
from service.engine import versions
from service.engine.client import EngineClient
from service.engine.deployment import Deployment
from service.engine.flight import GenerateRequest
from service.engine.models import LoadedModel
from service.errors import SwapFailed
from tests.service.engine.faults.scripted import NAME, journal, scripted_engine, write_checkpoint

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    return functools.partial(write_checkpoint, tmp_path)


@pytest.fixture
def first(make_folder: MakeFolder) -> Path:
    return make_folder(11)


@pytest.fixture
async def engine(first: Path) -> AsyncIterator[EngineClient]:
    """`m@1` is served; adapters are deployed over whatever has the name `m`."""
    async with scripted_engine(first) as made:
        yield made


async def deploy(engine: EngineClient, name: str, folder: Path, version: str, **more: Any) -> LoadedModel:
    return await engine.versions.deploy(name, Deployment(source=str(folder), version=version, **more))


async def ask(engine: EngineClient, name: str) -> set[int]:
    request = GenerateRequest(
        model=engine.resolve(name, "generate").key, prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=3)
    )
    return {id async for output in engine.generate(request) for id in output.token_ids}


async def until(condition: Callable[[], bool]) -> None:
    """Polls; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("way", ["deploy", "rollback"])
async def test_a_key_that_is_given_again_is_freed_before_it_is_loaded(
    engine: EngineClient, first: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The worker was told to free the former one up to a poll later, and then dropped the new one of its key."""
    monkeypatch.setattr(versions, "POLL_SECONDS", 0.3)
    held = engine.resolve(NAME, "generate")
    await deploy(engine, NAME, make_folder(12), "2")
    await asyncio.sleep(0.05)
    assert held.state == "draining"
    del held
    assert not engine.models.retired
    assert journal(first) == ["loaded"]
    if way == "deploy":
        await deploy(engine, NAME, first, "1")
    else:
        await engine.versions.rollback(NAME)
    await asyncio.sleep(0.5)
    assert journal(first) == ["loaded", "unloaded", "loaded"]
    assert await ask(engine, NAME) == {11}


async def test_what_is_still_in_use_is_put_back_into_service_when_it_is_deployed_again(
    engine: EngineClient, make_folder: MakeFolder
) -> None:
    adapter, other = make_folder(21), make_folder(22)
    held = await deploy(engine, "a", adapter, "x", adapter=True)
    engine.versions.remove("a")
    with pytest.raises(SwapFailed, match="a@x is loaded already"):
        await deploy(engine, "a", other, "x", adapter=True)  # of other files
    assert await deploy(engine, "a", adapter, "x", adapter=True) is held
    assert (engine.models["a"], held.state) == (held, "ready")
    del held
    await asyncio.sleep(2 * versions.POLL_SECONDS)
    assert journal(adapter) == ["loaded"]
    engine.versions.remove("a")
    await until(lambda: journal(adapter) == ["loaded", "unloaded"])


async def test_what_is_served_already_is_the_answer_in_place_and_refused_otherwise(
    engine: EngineClient, make_folder: MakeFolder
) -> None:
    adapter, other = make_folder(21), make_folder(22)
    served = await deploy(engine, "a", adapter, "x", adapter=True)
    with pytest.raises(SwapFailed, match="a@x is loaded already"):
        await deploy(engine, "a", adapter, "x", adapter=True)
    assert await deploy(engine, "a", adapter, "x", adapter=True, in_place=True) is served
    assert not engine.versions.can_roll_back("a")
    with pytest.raises(SwapFailed, match="a@x is loaded already"):
        await deploy(engine, "a", other, "x", adapter=True, in_place=True)
    await deploy(engine, "a", other, "y", adapter=True, keep_former=True)
    assert await deploy(engine, "a", adapter, "x", adapter=True, in_place=True) is engine.models["a"] is served
    await until(lambda: journal(other) == ["loaded", "unloaded"])
    assert journal(adapter) == ["loaded"]


async def test_nothing_is_collected_for_a_base_that_adapters_hold(
    engine: EngineClient, first: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced base cost a full collection each second for as long as an adapter was served over it."""
    await deploy(engine, "a", make_folder(21), "x", adapter=True)
    collections: list[bool] = []
    monkeypatch.setattr(versions, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(versions, "gc", SimpleNamespace(collect=lambda: collections.append(True)))
    await deploy(engine, NAME, make_folder(12), "2")
    await asyncio.sleep(0.3)
    assert not collections
    held = engine.models[NAME]
    await deploy(engine, NAME, make_folder(13), "3")
    await until(lambda: bool(collections))  # for what seems to be held by nobody
    assert held.state == "draining"
    assert journal(first) == ["loaded"]


async def test_a_base_that_rollbacks_alone_would_need_is_freed_and_they_are_refused_until_it_is_back(
    engine: EngineClient, first: Path, make_folder: MakeFolder
) -> None:
    adapter, second = make_folder(21), make_folder(12)
    await deploy(engine, "a", adapter, "x", adapter=True)
    await deploy(engine, NAME, second, "2")
    await deploy(engine, "a", adapter, "y", adapter=True)
    await until(lambda: journal(first) == ["loaded", "unloaded"])
    assert not engine.versions.can_roll_back("a")
    with pytest.raises(SwapFailed, match="a@x was served over m@1, which is not loaded any more"):
        await engine.versions.rollback("a")
    assert engine.models["a"].version == "y"
    await engine.versions.rollback(NAME)
    assert engine.versions.can_roll_back("a")
    await engine.versions.rollback("a")
    assert (engine.models["a"].version, engine.models["a"].base) == ("x", engine.models[NAME])
    await until(lambda: journal(second)[-1] == "unloaded")
    await deploy(engine, "a", make_folder(22), "z", adapter=True)
    await engine.versions.deploy(NAME, Deployment(source=str(make_folder(13)), version="3"))
    assert engine.versions.can_roll_back("a")  # its base is still there, with the adapter that is served
    await engine.versions.rollback("a")
    assert engine.models["a"].lane_key == f"{NAME}@1"


async def test_a_base_of_other_files_under_the_same_key_is_no_base_to_go_back_to(
    engine: EngineClient, first: Path, make_folder: MakeFolder
) -> None:
    adapter = make_folder(21)
    await deploy(engine, "a", adapter, "x", adapter=True)
    await deploy(engine, NAME, make_folder(12), "2")
    await deploy(engine, "a", adapter, "y", adapter=True)
    await until(lambda: journal(first) == ["loaded", "unloaded"])
    await deploy(engine, NAME, make_folder(13), "1")
    with pytest.raises(SwapFailed, match="which is not loaded any more"):
        await engine.versions.rollback("a")


async def test_a_name_is_a_checkpoints_or_an_adapters(engine: EngineClient, make_folder: MakeFolder) -> None:
    folder = make_folder(21)
    with pytest.raises(SwapFailed, match="'m' is the name of a checkpoint: give the adapter one of its own"):
        await deploy(engine, NAME, folder, "x", adapter=True)
    await deploy(engine, "a", folder, "x", adapter=True)
    with pytest.raises(SwapFailed, match="'a' is the name of an adapter: give the checkpoint one of its own"):
        await deploy(engine, "a", folder, "y")
    engine.versions.remove("a")
    await deploy(engine, "a", folder, "y")
    assert engine.models["a"].base is None


async def test_a_base_is_not_removed_while_an_adapter_is_being_loaded_over_it(
    engine: EngineClient, make_folder: MakeFolder
) -> None:
    await deploy(engine, "other", make_folder(12), "1")
    slow = make_folder(21, slow="")
    task = asyncio.ensure_future(deploy(engine, "a", slow, "x", adapter=True))
    await until(lambda: bool(engine.models.pending))
    with pytest.raises(SwapFailed, match="m@1 is the base of a@x"):
        engine.versions.remove(NAME)
    assert await ask(engine, NAME) == {11}  # which does not wait for the adapter
    (slow / "slow").unlink()
    await task
    assert engine.models["a"].base is engine.models[NAME]


async def test_an_adapter_whose_base_is_removed_while_it_is_read_is_refused(
    engine: EngineClient, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deploy(engine, "other", make_folder(12), "1")
    prepare, reading, go_on = engine.versions._prepare, threading.Event(), threading.Event()
    assert prepare is not None

    def slowly(*arguments: Any) -> LoadedModel:
        model = prepare(*arguments)
        reading.set()
        go_on.wait(60)
        return model

    monkeypatch.setattr(engine.versions, "_prepare", slowly)
    task = asyncio.ensure_future(deploy(engine, "a", make_folder(21), "x", adapter=True))
    await until(reading.is_set)
    engine.versions.remove(NAME)
    go_on.set()
    with pytest.raises(SwapFailed, match="m@1, the base of a@x, has been taken out of service meanwhile"):
        await task
    del task  # its error's frames hold the adapter
    await until(lambda: list(engine.models) == ["other"] and not engine.models.retired)
