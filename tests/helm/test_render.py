"""The chart renders: by both Helms alike, as committed, and into what Kubernetes takes."""

import importlib
import os
from typing import Any

import pytest
import yaml

KUBERNETES_VERSIONS = ("1.30", "1.33", "1.36")
CUSTOM_KINDS = {"PodMonitor", "PrometheusRule", "ScaledObject", "InferencePool", "HTTPRoute"}


def keyed(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(found["kind"], found["metadata"]["name"]): found for found in objects}


def ci_values(chart: Any, name: str) -> dict[str, Any]:
    return yaml.safe_load((chart.folder / "ci" / name).read_text())


def test_helm_3_finds_nothing_to_complain_about(chart: Any, ci_name: str) -> None:
    chart.run("lint", "--strict", str(chart.folder), "--values", str(chart.folder / "ci" / ci_name))


def test_helm_4_finds_nothing_to_complain_about(chart: Any, helm4: Any, ci_name: str) -> None:
    report = helm4.lint(chart.folder, ci_values(chart, ci_name), strict=True, namespace=chart.namespace)
    assert report["total_charts_linted"] == 1
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert report["errors"] == []


def test_both_helms_make_equal_objects(chart: Any, helm4: Any, ci_name: str) -> None:
    with helm4.Chart.load(chart.folder) as loaded:
        made = loaded.render(ci_values(chart, ci_name), name=chart.release, namespace=chart.namespace)
    texts = [text for path, text in made.items() if path.endswith(".yaml")]
    objects = [found for text in texts for found in chart.parse(text)]
    assert keyed(objects) == keyed(chart.ci(ci_name))


def test_rendering_twice_gives_the_same(chart: Any, ci_name: str) -> None:
    assert chart.template(chart.folder / "ci" / ci_name) == chart.ci_text(ci_name)


def test_what_is_rendered_is_what_was_reviewed(chart: Any, ci_name: str) -> None:
    """After a meant change: `make chart-files`, and read the difference."""
    golden = chart.golden / ci_name.replace("-values", "")
    if os.environ.get("WRITE_GOLDEN_FILES"):
        golden.write_text(chart.ci_text(ci_name))
    assert golden.read_text() == chart.ci_text(ci_name)


def test_no_golden_file_outlives_its_values(chart: Any) -> None:
    values = {path.name.replace("-values", "") for path in (chart.folder / "ci").iterdir()}
    assert {path.name for path in chart.golden.iterdir()} == values


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_knows_every_field(chart: Any, ci_name: str, version: str) -> None:
    """Kinds of others' alone are left out (test_custom_kinds.py)."""
    try:
        kubernetes = importlib.import_module("kubernetes_validate")
    except ImportError:
        pytest.skip("no kubernetes-validate: `make chart-tools` installs it")
    if "image" in ci_name and version < "1.35":
        pytest.skip("image volumes need Kubernetes 1.35")
    for found in chart.ci(ci_name):
        if found["kind"] not in CUSTOM_KINDS:
            assert kubernetes.validate(found, version, strict=True) == version, found["kind"]


def test_a_misspelt_field_of_kubernetes_is_seen(chart: Any) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    deployment = chart.only(chart.ci("default-values.yaml"), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(deployment, "1.33", strict=True)


def test_a_kind_that_kubernetes_does_not_know_is_seen(chart: Any) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    deployment = chart.only(chart.ci("default-values.yaml"), "Deployment")
    deployment["apiVersion"] = "apps/v2"
    with pytest.raises(kubernetes.SchemaNotFoundError):
        kubernetes.validate(deployment, "1.33", strict=True)


def test_every_kind_is_rendered_by_some_file(chart: Any) -> None:
    kinds = {found["kind"] for path in (chart.folder / "ci").iterdir() for found in chart.ci(path.name)}
    core = {"Deployment", "Service", "ServiceAccount", "ConfigMap", "PersistentVolumeClaim", "Pod", "Ingress"}
    assert kinds == core | CUSTOM_KINDS | {"HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"}


HUB = {"models": [{"name": "a", "hub": {"repository": "b/c"}}], "auth": {"enabled": False}}


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        (HUB | {"modelCache": {"persistent": True}}, True),
        (HUB | {"modelCache": {"persistent": True, "accessModes": ["ReadWriteMany"]}}, False),
        (HUB | {"modelCache": {"persistent": True}, "strategy": {"maxSurge": 0, "maxUnavailable": 1}}, False),
        (HUB, False),
    ],
)
def test_notes_warn_of_a_claim_that_a_second_node_cannot_have(
    chart: Any, helm4: Any, values: dict[str, Any], warned: bool
) -> None:
    with helm4.Chart.load(chart.folder) as loaded:
        made = loaded.render(values, name=chart.release, namespace=chart.namespace)
    (notes,) = (text for path, text in made.items() if path.endswith("NOTES.txt"))
    assert "No keys are asked for" in notes
    assert ("The models' claim is ReadWriteOnce: pods on another node" in notes) == warned
