"""An adapter's folder is served as the checkpoint that it makes of its base: same tokens, same tasks, same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shipped_adapter import SHIPPED, write_shipped_adapter

from model.calibration import write_calibration
from model.description import describe
from model.errors import CheckpointError
from model.ops import library
from service.calibrate import fitted_version
from service.cli import main
from service.engine.assembly import load_directory, prepare_model
from service.engine.cache_budget import Neighbours
from service.engine.deployment import Deployment
from service.engine.models import ModelDirectory
from service.engine.protocol import ModelSpec
from service.settings import Settings
from tests.service.engine import lanes

PROMPT = [10, 500, 77, 1200, 310, 42]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_shipped_adapter(tmp_path_factory.mktemp("adapters"))


def generate(folder: Path, base: Path | None = None, **wanted: Any) -> list[int]:
    return lanes.generate(PROMPT, folder=str(folder), base=None if base is None else str(base), **wanted)


@pytest.mark.parametrize(
    "wanted",
    [{"dtype": "float32"}, {"quantization": "int8"}, {"quantization": "int4"}],
    ids=["float32", "int8", "int4"],
)
def test_a_lane_generates_the_tokens_of_the_merged_checkpoint(
    folders: tuple[Path, Path], wanted: dict[str, Any]
) -> None:
    if "quantization" in wanted and not library.LOADED:
        pytest.skip("the operators were not compiled (no C++ compiler?)")
    adapter, merged = folders
    found = generate(adapter, adapter.parent / "base", **wanted)
    assert found == generate(merged, **wanted)
    assert found != generate(adapter.parent / "base", **wanted)


def test_it_is_loaded_with_its_base_and_known_by_its_own_folder(folders: tuple[Path, Path]) -> None:
    adapter, merged = folders
    model = load_directory(Settings(model=(f"{adapter}=tuned",)))["tuned"]
    expected = describe(merged)
    assert (model.spec.folder, model.spec.base) == (str(adapter), str(adapter.parent / "base"))
    assert model.description.folder == adapter
    assert model.description.base == "base"
    assert (model.tasks, model.description.eos_ids) == (expected.tasks, expected.eos_ids)
    assert model.tokenizer.encode("Once upon a time") == load_directory(Settings(model=(f"{merged}=m",)))[
        "m"
    ].tokenizer.encode("Once upon a time")


def test_a_version_that_is_an_adapter_can_be_deployed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, _ = folders
    found = prepare_model(
        Settings(), "lm", Deployment(source=str(adapter), version="tuned", dtype="float32"), ModelDirectory()
    )
    assert (found.key, found.spec.base) == ("lm@tuned", str(adapter.parent / "base"))
    lost = tmp_path / "lost"
    shutil.copytree(adapter, lost)
    with pytest.raises(CheckpointError, match=r"'\.\./base' by adapter_config\.json"):
        prepare_model(Settings(offline=True), "lm", Deployment(source=str(lost)), ModelDirectory())


def test_its_weights_are_reckoned_with_before_it_comes(folders: tuple[Path, Path]) -> None:
    adapter, merged = folders
    base = adapter.parent / "base"
    shares = [
        Neighbours(later=(ModelSpec(key="m@1", folder=str(folder), base=with_base),)).gpu_share(1 << 30)
        for folder, with_base in ((adapter, str(base)), (merged, None))
    ]
    assert shares[0] == shares[1] < 1 << 29


def test_models_says_what_an_adapter_is_of(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = folders
    assert main(["models", str(adapter.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{adapter}, an adapter of base" in lines
    assert str(adapter.parent / "base") in lines
    assert main(["models", "--json", str(adapter)]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == "base"


def test_a_calibration_is_of_the_adapter_and_its_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folders[0], adapter)
    shutil.copytree(SHIPPED, tmp_path / "base", ignore=shutil.ignore_patterns("*.png"))
    version = fitted_version(adapter)
    model = load_directory(Settings(model=(str(adapter),)))["adapter"]
    assert model.version == version
    known = model.description.calibration
    fitted = {"classifier": {"checkpoint_version": version}}
    write_calibration(adapter, type(known)({"classifier": 2.0}, fitted))
    assert load_directory(Settings(model=(str(adapter),)))["adapter"].description.calibration.temperature == {
        "classifier": 2.0
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    with pytest.raises(CheckpointError, match="was fitted on version"):
        load_directory(Settings(model=(str(adapter),)))
