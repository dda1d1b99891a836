"""The chart as tests see it: rendered by the Helm 3 command and by the Helm 4 engine, with values of ci/ or of a test.

Tests that need a tool skip where `make chart-tools` could not get it, and say so.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CI_FILES = sorted((REPOSITORY / "helm" / "ci").glob("*-values.yaml"))

Objects = list[dict[str, Any]]


class Chart:
    """Folders, the release's name, and what Helm makes of values. Raises ValueError with what Helm said."""

    repository = REPOSITORY
    folder = REPOSITORY / "helm"
    golden = Path(__file__).parent / "golden"
    helm = Path(sys.prefix) / "chart" / "package" / "bin" / "helm"
    release, namespace, kube_version = "slimpajama", "ai", "1.36.0"

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._ci_texts: dict[str, str] = {}

    def run(self, *arguments: str) -> str:
        done = subprocess.run([str(self.helm), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stdout + done.stderr)
        return done.stdout

    def template(self, values: Path, *, kube_version: str = kube_version) -> str:
        place = ("--namespace", self.namespace, "--kube-version", kube_version)
        return self.run("template", self.release, str(self.folder), "--values", str(values), *place)

    def ci_text(self, name: str) -> str:
        if name not in self._ci_texts:
            self._ci_texts[name] = self.template(self.folder / "ci" / name)
        return self._ci_texts[name]

    def ci(self, name: str) -> Objects:
        return self.parse(self.ci_text(name))

    def render(self, values: dict[str, Any], **options: str) -> Objects:
        path = self._scratch / "values.yaml"
        path.write_text(json.dumps(values))
        return self.parse(self.template(path, **options))

    @staticmethod
    def parse(text: str) -> Objects:
        return [found for found in yaml.safe_load_all(text) if found]

    @staticmethod
    def only(objects: Objects, kind: str) -> dict[str, Any]:
        (found,) = (found for found in objects if found["kind"] == kind)
        return found

    @staticmethod
    def only_named(objects: Objects, kind: str, name: str) -> dict[str, Any]:
        (found,) = (found for found in objects if found["kind"] == kind and found["metadata"]["name"] == name)
        return found

    @staticmethod
    def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every pod's spec, whatever makes it."""
        for found in objects:
            if found["kind"] == "Deployment":
                yield found["metadata"]["name"], found["spec"]["template"]["spec"]
            elif found["kind"] == "Pod":
                yield found["metadata"]["name"], found["spec"]

    @staticmethod
    def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
        return [*pod.get("initContainers", []), *pod["containers"]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `ci_name` runs for each file of helm/ci."""
    if "ci_name" in metafunc.fixturenames:
        metafunc.parametrize("ci_name", [path.name for path in CI_FILES])


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    if not Chart.helm.exists():
        pytest.skip("no Helm command: `make chart-tools` fetches it from npm")
    return Chart(tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="session")
def helm4() -> Any:
    try:
        return importlib.import_module("helm_python")
    except ImportError:
        pytest.skip("no Helm 4 engine: `make chart-tools` installs helm-python-sdk")


@pytest.fixture
def rendered(chart: Chart, ci_name: str) -> Objects:
    return chart.ci(ci_name)
