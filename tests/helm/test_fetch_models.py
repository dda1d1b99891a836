"""The init container's script: fetches, links, and starts from the cache where the hub is away."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model.errors import HubError

SCRIPT = Path(__file__).parents[2] / "helm" / "files" / "fetch_models.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """The script with a hub of our own: `hub(location, offline)` returns a folder or raises HubError."""

    def load(hub: Callable[[str, bool], Path]) -> ModuleType:
        spec = importlib.util.spec_from_file_location("fetch_models", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def resolve(location: str, *, offline: bool = False, **_: Any) -> Path:
            return hub(location, offline)

        monkeypatch.setattr(module, "resolve", resolve)
        monkeypatch.setattr(
            "model.adapters.folder.fetch",
            lambda name, revision=None, **named: resolve(name, revision=revision, **named),
        )
        entry = {"name": "a", "repository": "b/c", "revision": "", "folder": str(tmp_path / "served" / "a")}
        monkeypatch.setenv("FETCH_MODELS", json.dumps([entry]))
        return module

    return load


def checkpoint(folder: Path, name: str) -> Path:
    made = folder / "huggingface" / name
    made.mkdir(parents=True)
    (made / "config.json").write_text(name)
    return made


def test_a_fetched_model_is_linked_to_the_folder_that_is_served(
    script: Callable[..., ModuleType], tmp_path: Path
) -> None:
    found = checkpoint(tmp_path, "first")
    assert script(lambda location, offline: found).main() == 0
    served = tmp_path / "served" / "a"
    assert (served / "config.json").read_text() == "first"
    assert not served.readlink().is_absolute(), "the volume may be mounted elsewhere"


def test_a_new_revision_replaces_the_link(script: Callable[..., ModuleType], tmp_path: Path) -> None:
    for name in ("first", "second"):
        found = checkpoint(tmp_path, name)
        assert script(lambda location, offline, found=found: found).main() == 0
    assert (tmp_path / "served" / "a" / "config.json").read_text() == "second"
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["a"]


def test_a_hub_that_is_away_does_not_matter_to_a_full_cache(script: Callable[..., ModuleType], tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "cached")

    def hub(location: str, offline: bool) -> Path:
        if not offline:
            raise HubError("the hub cannot be reached")
        return found

    assert script(hub).main() == 0
    assert (tmp_path / "served" / "a" / "config.json").read_text() == "cached"


def test_a_model_that_cannot_be_had_stops_the_pod_and_says_why(
    script: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    def hub(location: str, offline: bool) -> Path:
        raise HubError("offline mode is on" if offline else f"{location} is gated")

    assert script(hub).main() == 1
    assert capsys.readouterr().err == "a: b/c is gated\n"


@pytest.mark.parametrize("away", [False, True])
def test_the_base_of_an_adapter_is_fetched_with_it(
    script: Callable[..., ModuleType], tmp_path: Path, away: bool
) -> None:
    adapter, base = tmp_path / "huggingface" / "adapter", checkpoint(tmp_path, "base")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "maker/base"}')
    asked = []

    def hub(location: str, offline: bool) -> Path:
        asked.append((location, offline))
        if away and not offline:
            raise HubError("the hub cannot be reached")
        return {"b/c": adapter, "maker/base": base}[location]

    assert script(hub).main() == 0
    assert asked[-1] == ("maker/base", away)
    assert (tmp_path / "served" / "a").resolve() == adapter


def test_the_base_that_an_adapter_shares_is_another_entry(
    script: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "maker/base"}')

    def hub(location: str, offline: bool) -> Path:
        assert location == "b/c"
        return adapter

    module = script(hub)
    folder = tmp_path / "served" / "a"
    entry = {"name": "a", "repository": "b/c", "revision": "", "adapter": True, "folder": str(folder)}
    monkeypatch.setenv("FETCH_MODELS", json.dumps([entry]))
    assert module.main() == 0
    assert folder.resolve() == adapter


def test_an_adapter_whose_base_cannot_be_had_stops_the_pod(
    script: Callable[..., ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "maker/base"}')

    def hub(location: str, offline: bool) -> Path:
        if location == "maker/base":
            raise HubError("maker/base is gated")
        return adapter

    assert script(hub).main() == 1
    assert "maker/base is gated" in capsys.readouterr().err
    assert not (tmp_path / "served" / "a").exists()
