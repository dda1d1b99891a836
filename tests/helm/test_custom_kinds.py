"""The kinds of others that the chart makes fit what their owners define.

PodMonitor, PrometheusRule, ScaledObject and HTTPRoute are held against the packages `@kubernetes-models/*`, made from
the owners' sources: TypeScript sees unknown, missing and wrongly typed fields at every level, the packages' validators
formats and bounds. No package has InferencePool: its schema is ours (kinds/inference_pool.json). Where `make
chart-tools` could not get the packages, these tests skip and say so.
"""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

PACKAGES = Path(sys.prefix) / "chart" / "kinds" / "node_modules"
MODULES = {
    "PodMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
    "HTTPRoute": "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute",
}
POOL_SCHEMA = json.loads((Path(__file__).parent / "kinds" / "inference_pool.json").read_text())

Check = Callable[[list[dict[str, Any]]], str]


@pytest.fixture
def complaints(tmp_path: Path) -> Check:
    """What the owners' definitions say against objects; empty where nothing."""
    node = shutil.which("node")
    if node is None or not PACKAGES.is_dir():
        pytest.skip("no definitions of others' kinds: `make chart-tools` fetches them from npm")
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    (tmp_path / "package.json").write_text('{"type": "module"}')

    def check(objects: list[dict[str, Any]]) -> str:
        module = tmp_path / "objects.js"
        imports = [f'import {{ {kind} }} from "{path}";' for kind, path in MODULES.items()]
        module.write_text("\n".join([*imports, *map(statement, objects)]))
        compiler = [node, str(PACKAGES / "typescript/bin/tsc"), "--noEmit", "--allowJs", "--checkJs", "--strict"]
        compiler += ["--skipLibCheck", "--module", "nodenext", "--target", "es2022", str(module)]
        typed = subprocess.run(compiler, capture_output=True, text=True, cwd=tmp_path)
        ran = subprocess.run([node, str(module)], capture_output=True, text=True, cwd=tmp_path)
        return (typed.stdout if typed.returncode else "") + (ran.stderr if ran.returncode else "")

    return check


def statement(found: dict[str, Any]) -> str:
    """An object as a literal, where TypeScript refuses what its type does not name."""
    kind, literal = found["kind"], json.dumps(found, indent=1)
    typed = f'/** @satisfies {{import("{MODULES[kind]}").I{kind}}} */ ({literal})'
    return f"new {kind}(/** @type {{any}} */ ({typed})).validate();"


def of_others(chart: Any, kinds: set[str]) -> list[dict[str, Any]]:
    every = [found for path in sorted((chart.folder / "ci").iterdir()) for found in chart.ci(path.name)]
    return [found for found in every if found["kind"] in kinds]


def test_kinds_of_others_are_as_their_owners_define_them(chart: Any, complaints: Check) -> None:
    objects = of_others(chart, set(MODULES))
    assert {found["kind"] for found in objects} == set(MODULES)
    assert complaints(objects) == ""


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "a misspelt field": (
        "PodMonitor",
        lambda found: found["spec"]["podMetricsEndpoints"][0].update(intervall="1s"),
        "'\"intervall\"' does not exist",
    ),
    "a version that is none": (
        "HTTPRoute",
        lambda found: found.update(apiVersion="gateway.networking.k8s.io/v2"),
        "v2",
    ),
    "a missing field": ("PodMonitor", lambda found: found["spec"].pop("selector"), "selector"),
    "a number for text": (
        "ScaledObject",
        lambda found: found["spec"]["triggers"][0]["metadata"].update(threshold=8),
        "threshold",
    ),
    "an unknown choice": (
        "HTTPRoute",
        lambda found: found["spec"]["rules"][0]["matches"][0]["path"].update(type="Glob"),
        "Glob",
    ),
    "a rule that is none": ("PrometheusRule", lambda found: found["spec"]["groups"][0]["rules"][0].pop("expr"), "expr"),
    "a port out of bounds": (
        "HTTPRoute",
        lambda found: found["spec"]["rules"][0].update(backendRefs=[{"name": "a", "port": 70000}]),
        "port",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kind_of_others_is_seen(chart: Any, complaints: Check, name: str) -> None:
    kind, harm, complaint = FAULTS[name]
    found = copy.deepcopy(of_others(chart, {kind})[0])
    harm(found)
    assert complaint in complaints([found])


def test_inference_pools_are_as_documented(chart: Any) -> None:
    pools = of_others(chart, {"InferencePool"})
    assert pools
    for pool in pools:
        jsonschema.Draft7Validator(POOL_SCHEMA).validate(pool)


@pytest.mark.parametrize(
    "harm",
    [
        lambda spec: spec.pop("selector"),
        lambda spec: spec.update(targetPortNumber=8000),
        lambda spec: spec.update(targetPorts=[{"number": 8000 + i} for i in range(9)]),
        lambda spec: spec["endpointPickerRef"].pop("port"),
        lambda spec: spec["endpointPickerRef"].update(failureMode="Open"),
    ],
)
def test_a_fault_in_an_inference_pool_is_seen(chart: Any, harm: Callable[[dict[str, Any]], object]) -> None:
    pool = copy.deepcopy(of_others(chart, {"InferencePool"})[0])
    harm(pool["spec"])
    assert not jsonschema.Draft7Validator(POOL_SCHEMA).is_valid(pool)
