"""Adapters over one base as the API process finds them: whose they are, what they bring along, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from service.engine.assembly import load_directory
from service.settings import Settings
from tests.service.engine.shared_adapters import settings_of, write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("shared"))


def test_an_adapter_is_a_model_of_its_own_over_its_base(folders: dict[str, Path]) -> None:
    directory = load_directory(settings_of(folders))
    base, one = directory["base"], directory["one"]
    assert one.base is base
    assert (one.lane_key, one.spec.shares, one.spec.base) == (base.key, base.key, str(folders["base"]))
    assert one.key != base.key
    assert one.tokenizer is base.tokenizer
    assert one.location == str(folders["one"])
    assert directory.resolve(None, "generate") is base


def copy(folders: dict[str, Path], target: Path, **changes: Any) -> Path:
    """Adapter one elsewhere, with other settings."""
    shutil.copytree(folders["one"], target)
    settings = json.loads((target / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": str(folders["base"])} | changes
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize(
    ("named", "served", "alias"),
    [
        ("owner/base", "base", ()),
        ("owner/base", "owner/base", ()),
        ("owner/other", "lm", ("other=lm",)),
        ("owner/other", "lm", ("owner/other=lm",)),
    ],
)
def test_a_base_is_known_by_the_names_that_it_is_served_under(
    folders: dict[str, Path], tmp_path: Path, named: str, served: str, alias: tuple[str, ...]
) -> None:
    adapter = copy(folders, tmp_path / "moved", base_model_name_or_path=named)
    settings = Settings(model=(f"{folders['base']}={served}",), adapter=(str(adapter),), alias=alias)
    directory = load_directory(settings)
    assert directory["moved"].base is directory[served]


def test_a_base_that_is_there_and_not_served_is_not_taken_for_one_of_its_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["base"], tmp_path / "base")
    adapter = copy(folders, tmp_path / "adapter", base_model_name_or_path="../base")
    with pytest.raises(CheckpointError, match=r"its base, '\.\./base'.*not served.*--alias base=NAME.*: base"):
        load_directory(Settings(model=(f"{folders['base']}=base",), adapter=(str(adapter),)))


def test_what_is_no_adapter_and_what_has_no_base_here_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = copy(folders, tmp_path / "lost", base_model_name_or_path="nobody/knows")
    with pytest.raises(CheckpointError, match=r"'nobody/knows' by adapter_config.json, is not served; give it as"):
        load_directory(Settings(model=(f"{folders['base']}=base",), adapter=(str(adapter),)))
    with pytest.raises(CheckpointError, match="is no LoRA adapter"):
        load_directory(Settings(model=(f"{folders['base']}=base",), adapter=(f"{folders['merged']}=other",)))
    merged = copy(folders, tmp_path / "twice", base_model_name_or_path="tuned")
    with pytest.raises(CheckpointError, match="its base, 'tuned', is an adapter itself"):
        load_directory(Settings(model=(f"{folders['one']}=tuned",), adapter=(str(merged),)))


def test_a_broken_adapter_is_refused_with_its_file_and_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = copy(folders, tmp_path / "broken")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3, 3)}, adapter / "adapter_model.safetensors")
    settings = Settings(model=(f"{folders['base']}=base",), adapter=(str(adapter),))
    with pytest.raises(CheckpointError, match=rf"{adapter}: adapter_model.safetensors: tensor '{name}' has shape"):
        load_directory(settings)
    whole = (folders["one"] / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_model.safetensors"):
        load_directory(settings)


def test_another_tokenizer_or_network_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = Settings(model=(f"{folders['base']}=base",), adapter=(str(tmp_path / "own"),))
    adapter = copy(folders, tmp_path / "own")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["base"] / name, adapter)
    directory = load_directory(settings)
    assert directory["own"].tokenizer is directory["base"].tokenizer
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    token = next(iter(tokenizer["model"]["vocab"]))
    tokenizer["model"]["vocab"]["something-else"] = tokenizer["model"]["vocab"].pop(token)
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        CheckpointError, match="its tokenizer has other tokens than its base's, 'base': serve it merged"
    ):
        load_directory(settings)
    shutil.copy(folders["base"] / "tokenizer.json", adapter)
    config = json.loads((folders["base"] / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(CheckpointError, match=r"its config\.json asks for another network"):
        load_directory(settings)


def test_a_chat_template_of_its_own_is_used(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = copy(folders, tmp_path / "own")
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    directory = load_directory(Settings(model=(f"{folders['base']}=base",), adapter=(str(adapter),)))
    template, theirs = directory["own"].chat_template, directory["base"].chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "Hi"}]) == "Hi!"
    assert theirs is None or theirs.render([{"role": "user", "content": "Hi"}]) != "Hi!"
