"""Temporary folders go with whoever made them, however that ends, and with nobody else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.temporary_folder import TemporaryFolder, remove_abandoned

MAKER = """
import sys, tempfile
from model.temporary_folder import TemporaryFolder
made = [TemporaryFolder(kind) for kind in ("adapter", "gguf", "ranks")]
for folder in made:
    (folder.path / "config.json").write_text("{}")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(temporary: Path) -> None:
    """Folders of links stayed for ever after a SIGKILL while a checkpoint was loaded."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        remove_abandoned()
        assert len(list(temporary.glob("*/config.json"))) == 3
        process.send_signal(signal.SIGKILL)
    assert len(list(temporary.iterdir())) == 3
    made = TemporaryFolder("gguf")
    assert list(temporary.iterdir()) == [made.path]


def test_folders_of_one_process_leave_each_other_alone(temporary: Path) -> None:
    first, second = TemporaryFolder("adapter"), TemporaryFolder("adapter")
    remove_abandoned()
    assert {first.path, second.path} == set(temporary.iterdir())
    first.remove()
    assert list(temporary.iterdir()) == [second.path]
    del second
    assert not list(temporary.iterdir())


def test_nothing_else_is_taken_for_abandoned(temporary: Path) -> None:
    """Anyone can make a link of such a name in a folder that all share."""
    (temporary / "mine").mkdir()
    (temporary / "slimpajama-gguf-link").symlink_to(temporary / "mine")
    (temporary / "slimpajama-adapter-file").touch()
    (temporary / "slimpajama-other-x").mkdir()
    before = set(temporary.iterdir())
    remove_abandoned()
    assert set(temporary.iterdir()) == before
    assert (temporary / "mine").is_dir()


def test_a_folder_that_is_taken_before_it_is_held_is_made_anew(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that starts at the same moment may find it not held yet."""
    seen: list[Path] = []

    def take_first(descriptor: int, operation: int) -> None:
        seen.extend(path for path in temporary.iterdir() if path not in seen)
        if len(seen) == 1:
            seen[0].rmdir()

    monkeypatch.setattr("fcntl.flock", take_first)
    made = TemporaryFolder("adapter")
    assert made.path.is_dir()
    assert made.path != seen[0]
