"""The Dockerfile, YAML files and shell scripts pass their linters, and what a build may see is named, not guessed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "Dockerfile"


def run(tool: str, *arguments: str) -> None:
    found = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool}: `make chart-tools` installs it")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_passes_hadolint() -> None:
    run("hadolint", "--failure-threshold", "info", str(DOCKERFILE))


def test_yaml_passes_yamllint() -> None:
    files = [
        *(REPOSITORY / "helm").glob("*.yaml"),
        *(REPOSITORY / "helm" / "ci").glob("*.yaml"),
        *(REPOSITORY / "helm" / "rules").glob("*.yaml"),
        *(REPOSITORY / "tests" / "helm").glob("*.yaml"),
    ]
    run("yamllint", "--strict", "--config-file", "tests/deploy/yamllint.yaml", *map(str, files))


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [*(REPOSITORY / "tests" / "deploy").glob("*.sh"), REPOSITORY / ".ci" / "run"]
    run("shellcheck", *map(str, scripts))


def test_the_image_runs_as_a_number_and_gets_signals() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["slimpajama", "serve"\]$', text, re.MULTILINE)
    assert "STOPSIGNAL SIGTERM" in text


def test_a_build_sees_only_what_it_copies() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert "*" in ignored
    assert allowed == copied
