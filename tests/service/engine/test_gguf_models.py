"""A GGUF file that is served: its name, and the folder that it is unpacked into for as long as it is known."""

import gc
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import CheckpointError
from service.cli import main
from service.engine.assembly import load_directory, load_model
from service.model_source import ModelSource
from service.settings import Settings

RECORDED = Path(__file__).parents[2] / "reference/gguf/bpe-smollm.gguf.gz"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Story-Q8_0-00001-of-00001.gguf"
    path.write_bytes(gzip.decompress(RECORDED.read_bytes()))
    return path


def test_a_file_is_served_under_its_name_without_the_ending(file: Path) -> None:
    assert ModelSource.parse(str(file)) == ModelSource(str(file), "Story-Q8_0")
    assert ModelSource.parse(f"{file}=story@2") == ModelSource(str(file), "story", "2")


@pytest.mark.parametrize("given", ["file", "folder"])
def test_the_folder_lives_as_long_as_the_model(file: Path, temporary: Path, given: str) -> None:
    location = file if given == "file" else file.parent
    model = load_model(ModelSource.parse(f"{location}=story"), Settings())
    assert [str(path) for path in temporary.iterdir()] == [model.spec.folder]
    assert model.tokenizer.encode("the lion")
    del model
    gc.collect()
    assert not list(temporary.iterdir())


def test_the_folder_is_there_for_what_a_rollback_keeps(file: Path, temporary: Path) -> None:
    """It went with the version that was replaced, so that nothing could go back to it."""
    model = load_model(ModelSource.parse(f"{file}=story"), Settings())
    assert model.location == str(file)
    kept = replace(model, state="loading")
    del model
    gc.collect()
    assert [str(path) for path in temporary.iterdir()] == [kept.spec.folder]
    del kept
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_start_clears_what_killed_processes_left(temporary: Path) -> None:
    for name in ("slimpajama-gguf-1", "slimpajama-adapter-2"):
        (temporary / name).mkdir()
    load_directory(Settings(model=()))
    assert not list(temporary.iterdir())


def test_a_file_that_cannot_be_served_leaves_no_folder(
    file: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("it is not to be")

    monkeypatch.setattr("service.engine.assembly.describe", refuse)
    with pytest.raises(CheckpointError, match="not to be"):
        load_model(ModelSource.parse(f"{file}=story"), Settings())
    assert not list(temporary.iterdir())


def test_models_lists_what_folders_hold(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of folders with a file each was none that holds anything, one with two files an error."""
    data = file.read_bytes()
    file.unlink()
    paths = [tmp_path / "all" / name for name in ("one/a.gguf", "two/b.gguf", "two/c.gguf")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert main(["models", str(tmp_path / "all"), "--json"]) == 0
    listed = [json.loads(line)["folder"] for line in capsys.readouterr().out.splitlines()]
    assert listed == [str(paths[0].parent), str(paths[1]), str(paths[2])]
    assert main(["models", str(tmp_path / "all/two")]) == 0


def test_models_lists_files_and_leaves_no_folder(
    file: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", str(file)]) == 0
    assert f"{file}\n  LlamaForCausalLM" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["models", str(file)]) == 1
    assert "cut off" in capsys.readouterr().err
    assert not list(temporary.iterdir())
