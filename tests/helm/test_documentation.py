"""What docs/kubernetes.md tells its readers to do is what the chart, the service and its metrics take."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics

Render = Callable[[list[str]], list[dict[str, Any]]]
TEXT = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def helm_commands(verb: str) -> list[list[str]]:
    """The options of `helm VERB slimpajama helm OPTIONS...`."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition("&&")[0]) for line in lines if line.startswith(f"helm {verb} ")]
    assert all(words[2:4] == ["slimpajama", "helm"] for words in found)
    return [words[4:] for words in found]


def settings_block(key: str) -> Any:
    (found,) = (given for given in map(yaml.safe_load, blocks("yaml")) if key in given)
    return found[key]


def gauges() -> set[str]:
    metrics = Metrics()
    metrics.model_metrics(model="m", version="1")
    return {family.name for family in metrics.registry.collect() if family.type == "gauge"}


def secrets(node: Any) -> Iterator[tuple[str, str]]:
    """Name and key of those that a pod takes variables from."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "secretKeyRef":
            yield value["name"], value["key"]
        else:
            yield from secrets(value)


def mounted_secrets(pod: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and key of those in which the service looks for files."""
    volumes = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    for setting in ("api_keys_file", "admin_keys_file"):
        if setting in config:
            file = Path(config[setting])
            yield volumes.pop(mounts[str(file.parent)]), file.name
    assert not volumes


@pytest.fixture
def render(chart: Any, monkeypatch: pytest.MonkeyPatch) -> Render:
    """Of options that are typed in the repository's root."""
    monkeypatch.chdir(chart.repository)
    command = ("template", chart.release, "helm", "--kube-version", chart.kube_version)
    return lambda options: chart.parse(chart.run(*command, *options))


@pytest.mark.parametrize("options", helm_commands("install"), ids=" ".join)
def test_every_installation_renders_with_secrets_and_an_image_that_are_made(
    chart: Any, render: Render, options: list[str]
) -> None:
    objects = render(options)
    made = set(re.findall(r"--tag (\S+)", TEXT))
    for _, pod in chart.pods(objects):
        assert {container["image"] for container in chart.containers(pod)} <= made
    deployment = chart.only(objects, "Deployment")
    config = chart.only_named(objects, "ConfigMap", deployment["metadata"]["name"])["data"]["service.yaml"]
    pod = deployment["spec"]["template"]["spec"]
    needed = {*secrets(objects), *mounted_secrets(pod, yaml.safe_load(config))}
    assert needed
    assert needed <= set(re.findall(r"kubectl create secret generic (\S+) --from-literal=([\w-]+)=", TEXT))


def test_an_installation_is_waited_for_before_it_is_tested() -> None:
    """`helm install` returns at once, and the test's pod asks once."""
    tested = [block for block in blocks("sh") if "helm test" in block]
    assert tested
    assert all("--wait" in block for block in tested)


def test_an_upgrade_takes_what_the_installation_was_given(chart: Any, render: Render) -> None:
    (upgrade,) = helm_commands("upgrade")
    upgrade.remove("--reset-then-reuse-values")  # Helm 3.10 does not know it; what it does follows
    for given in helm_commands("install"):
        before, after = (chart.only(render(options), "Deployment") for options in (given, given + upgrade))
        assert before["spec"]["selector"] == after["spec"]["selector"]
        assert before["spec"]["template"] != after["spec"]["template"]


def test_the_endpoint_picker_is_told_of_gauges_that_exist(chart: Any) -> None:
    (engine,) = settings_block("engineConfigs")
    assert {value for key, value in engine.items() if key.endswith("Spec")} <= gauges()
    deployment = chart.only(chart.ci("inferencepool-values.yaml"), "Deployment")
    assert deployment["spec"]["template"]["metadata"]["labels"]["llm-d.ai/engine-type"] == engine["name"]


def test_the_adapter_offers_what_the_hpa_asks_for(chart: Any) -> None:
    (rule,) = settings_block("rules")
    pattern = re.search(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert pattern is not None
    hpa = chart.only(chart.ci("hpa-values.yaml"), "HorizontalPodAutoscaler")
    wanted = {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]}
    assert {name for name in gauges() if re.fullmatch(pattern[1], name)} == wanted


def test_rays_arguments_are_settings() -> None:
    ray = pytest.importorskip("service.ray", reason="needs the extra slimpajama[ray]")
    (application,) = settings_block("applications")
    known = {*ray.Settings.model_fields, *ray.Scaling.model_fields} - ray.OF_THE_PROXY
    assert set(application["args"]) <= known, json.dumps(application)
