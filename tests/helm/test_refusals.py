"""Wrong values are refused, with advice: misspelt keys at every level, wrong types, combinations that cannot work."""

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CHART = Path(__file__).parents[2] / "helm"
OPEN = {"auth": {"enabled": False}}
HUB = {"models": [{"name": "a", "hub": {"repository": "b/c"}}]}

# Values, and a part of what Helm must say. One for each `fail` of templates/_validate.tpl.
COMBINATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "neither keys nor none": ({}, "auth.apiKeys.existingSecret is empty"),
    "keys and none": ({"auth": {"enabled": False, "apiKeys": {"existingSecret": "a"}}}, "contradicts"),
    "a model with two sources": (
        OPEN | {"models": [{"name": "a", "path": "/a", "pvc": {"claimName": "b"}}]},
        "a has 2 sources (path, pvc); give exactly one",
    ),
    "a name twice": (OPEN | {"models": [{"name": "a", "path": "/a"}] * 2}, "the name a is given twice"),
    "an adapter over a divided base": (
        OPEN
        | {"models": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b", "adapter": True}]}
        | {"accelerator": {"type": "nvidia", "count": 2}},
        "b is an adapter, which cannot share a base that is divided over 2 devices",
    ),
    "a draft of nothing": (
        OPEN | {"models": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b", "draftFor": "c"}]},
        "b is the draft of c, which is no other entry",
    ),
    "a draft on a GPU": (
        OPEN
        | {"models": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b", "draftFor": "a"}]}
        | {"accelerator": {"type": "nvidia"}},
        "b is a draft, which guesses on CPUs alone",
    ),
    "too little grace": (
        OPEN | {"lifecycle": {"terminationGracePeriodSeconds": 60}},
        "preStop 15 + drain 60 + 15 = 90",
    ),
    "more least than most": (OPEN | {"autoscaling": {"engine": "keda", "minReplicas": 5}}, "is more than"),
    "to zero": (OPEN | {"autoscaling": {"engine": "keda", "minReplicas": 0}}, "nothing would start the first again"),
    "a budget for one replica": (OPEN | {"podDisruptionBudget": {"mode": "always"}}, "no node could ever be drained"),
    "a budget of nothing": (OPEN | {"replicaCount": 2, "podDisruptionBudget": {"maxUnavailable": "0%"}}, "mode=never"),
    "a roll-out that cannot begin": (OPEN | {"strategy": {"maxSurge": 0}}, "could never begin"),
    "a claim for one pod, and surge": (
        OPEN | HUB | {"modelCache": {"persistent": True, "accessModes": ["ReadWriteOncePod"]}},
        "ReadWriteOncePod",
    ),
    "a claim for one pod, and two": (
        OPEN
        | HUB
        | {
            "modelCache": {"persistent": True, "accessModes": ["ReadWriteOncePod"]},
            "strategy": {"maxSurge": 0, "maxUnavailable": 1},
            "replicaCount": 2,
        },
        "only one pod may have the claim",
    ),
    "a label of the selector": (
        OPEN | {"podLabels": {"app.kubernetes.io/name": "other"}},
        "cannot hold app.kubernetes.io/name",
    ),
    "a variable against the chart": (
        OPEN | {"extraEnv": [{"name": "SLIMPAJAMA_DRAIN_TIMEOUT", "value": "500"}]},
        "SLIMPAJAMA_DRAIN_TIMEOUT would contradict",
    ),
    "ingress without hosts": (OPEN | {"ingress": {"enabled": True}}, "name at least one host"),
    "route without gateway": (OPEN | {"httpRoute": {"enabled": True}}, "name the gateway"),
    "pool without picker": (OPEN | {"inferencePool": {"enabled": True}}, "endpoint picker's Service"),
    "pool with tls": (
        OPEN | {"inferencePool": {"enabled": True, "endpointPicker": {"name": "a"}}, "tls": {"existingSecret": "a"}},
        "end TLS at the gateway",
    ),
    "pool with keys for metrics": (
        OPEN
        | {"inferencePool": {"enabled": True, "endpointPicker": {"name": "a"}}, "settings": {"metrics_public": False}},
        "no key for /metrics",
    ),
    "monitor without a key": (
        OPEN | {"metrics": {"podMonitor": {"enabled": True}}, "settings": {"metrics_public": False}},
        "metrics.podMonitor.keySecret.name",
    ),
    "traces that cannot get out": (
        OPEN | {"networkPolicy": {"enabled": True}, "settings": {"otlp_endpoint": "http://collector:4318"}},
        "a rule of networkPolicy.egress",
    ),
    "more ranks than GPUs": (
        OPEN | {"accelerator": {"type": "nvidia", "count": 2}, "settings": {"tensor_parallel_size": 4}},
        "settings.tensor_parallel_size is 4 with 2 GPUs",
    ),
    "several slices of a GPU": (
        OPEN | {"accelerator": {"type": "nvidia", "count": 2, "resourceName": "nvidia.com/mig-3g.40gb"}},
        "raise replicaCount instead",
    ),
    "runtime class without GPU": (OPEN | {"accelerator": {"runtimeClassName": "nvidia"}}, "no GPU is requested"),
    "GPUs among the resources": (
        OPEN | {"resources": {"limits": {"nvidia.com/gpu": 1}}},
        "accelerator.type and accelerator.count",
    ),
}
WRONG_TYPES: dict[str, dict[str, Any]] = {
    "text for a number": {"server": {"port": "eighty"}},
    "a privileged port": {"server": {"port": 80}},
    "a quantity that only a server would see": {"resources": {"limits": {"memory": "1GiB"}}},
    "a setting that the chart derives": {"settings": {"port": 9000}},
    "a setting out of bounds": {"settings": {"kv_cache_fraction": 1.5}},
    "a setting's unknown choice": {"settings": {"log_level": "loud"}},
    "seconds below nothing": {"minReadySeconds": -1},
    "latest": {"image": {"tag": "latest"}},
    "a digest that is none": {"image": {"digest": "sha256:abc"}},
    "no models": {"models": []},
    "a model's misspelt key": {"models": [{"name": "a", "hubb": {}}]},
    "a hub's misspelt key": {"models": [{"name": "a", "hub": {"repository": "b/c", "revison": "d"}}]},
    "a served name with a blank": {"models": [{"name": "a b", "path": "/a"}]},
    "a misspelt field of a pod's security": {"podSecurityContext": {"runAsNonRot": True}},
    "a misspelt field of a container's security": {"securityContext": {"readOnlyRootFileSystem": True}},
    "a misspelt field inside it": {"securityContext": {"capabilities": {"dorp": ["ALL"]}}},
    "a misspelt toleration": {"tolerations": [{"kee": "dedicated"}]},
    "a misspelt affinity": {"affinity": {"podAntiAfinity": {}}},
    "a misspelt spread": {"topologySpreadConstraints": [{"maxSkev": 1}]},
    "a misspelt variable": {"extraEnv": [{"name": "A", "valeu": "b"}]},
    "a misspelt mount": {"extraVolumeMounts": [{"name": "a", "mountpath": "/a"}]},
    "a misspelt container": {"extraContainers": [{"nam": "a"}]},
    "a misspelt peer": {"networkPolicy": {"ingressFrom": [{"namespaceselector": {}}]}},
    "a misspelt rule": {"networkPolicy": {"egress": [{"too": []}]}},
    "a misspelt port of a rule": {"networkPolicy": {"egress": [{"ports": [{"prot": 443}]}]}},
    "a misspelt label selector": {"networkPolicy": {"ingressFrom": [{"podSelector": {"matchLabel": {"a": "b"}}}]}},
    "a misspelt node affinity": {"affinity": {"nodeAffinity": {"requiredDuringScheduling": {}}}},
    "a misspelt source of a variable": {"extraEnv": [{"name": "A", "valueFrom": {"secretKeyReff": {"name": "b"}}}]},
    "a misspelt probe": {"extraContainers": [{"name": "a", "livenessProbe": {"httpGet": {"port": 1, "pth": "/"}}}]},
    "a misspelt volume": {"extraVolumes": [{"name": "a", "emptydir": {}}]},
    "a misspelt field of a volume": {"extraVolumes": [{"name": "a", "emptyDir": {"sizelimit": "1Gi"}}]},
    "a misspelt gateway": {"httpRoute": {"parentRefs": [{"name": "a", "namspace": "b"}]}},
    "a label that is a number": {"podLabels": {"a": 1}},
    "an unknown engine": {"autoscaling": {"engine": "vpa"}},
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", CHART / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def documented_keys() -> Iterator[tuple[str, ...]]:
    made = generate()
    yield from (entry.path for entry in made.entries())
    yield from (("settings", name) for name, _ in made.setting_schemas())


@pytest.mark.parametrize("path", list(documented_keys()), ids=".".join)
def test_a_misspelt_key_is_refused(validator: jsonschema.Draft7Validator, path: tuple[str, ...]) -> None:
    values = copy.deepcopy(yaml.safe_load((CHART / "values.yaml").read_text()))
    assert validator.is_valid(values)
    section = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1] + "s"] = section.pop(path[-1], None)
    assert not validator.is_valid(values)


@pytest.mark.parametrize("section", [(), ("image",), ("probes", "liveness"), ("auth", "apiKeys"), ("settings",)])
def test_helm_itself_refuses_a_misspelt_key(chart: Any, section: tuple[str, ...]) -> None:
    values: dict[str, Any] = {"misspelt": 1}
    for key in reversed(section):
        values = {key: values}
    with pytest.raises(ValueError, match="Additional property misspelt is not allowed"):
        chart.render({"auth": {"enabled": False}} | values)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_value_is_refused(validator: jsonschema.Draft7Validator, name: str) -> None:
    assert not validator.is_valid(WRONG_TYPES[name])


def open_objects(node: Any, path: str) -> Iterator[str]:
    """Where a schema takes keys that it does not know."""
    if isinstance(node, list):
        for part in node:
            yield from open_objects(part, path)
    elif isinstance(node, dict):
        types = node.get("type", [])
        is_object = "properties" in node or "object" in ([types] if isinstance(types, str) else types)
        if is_object and node.get("additionalProperties", True) is True:
            yield path
        for name, part in node.get("properties", {}).items():
            yield from open_objects(part, f"{path}.{name}")
        for key, part in node.items():
            if key not in ("properties", "default", "enum", "const"):
                yield from open_objects(part, path)


def test_no_level_takes_a_key_that_it_does_not_know() -> None:
    """But for objects of any kind, what Helm gives charts within charts, and a claim's managedFields."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    kinds = schema.pop("definitions")
    found = {*open_objects(schema, "values")}.union(*(open_objects(node, name) for name, node in kinds.items()))
    assert found == {"values.global", "values.extraObjects", "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1"}


def test_both_helms_heed_the_schema(chart: Any, helm4: Any) -> None:
    with pytest.raises(ValueError, match=r"server\.port"):
        chart.render(OPEN | WRONG_TYPES["text for a number"])
    with helm4.Chart.load(chart.folder) as loaded, pytest.raises(helm4.HelmError, match="port"):
        loaded.validate_schema(WRONG_TYPES["text for a number"])


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_that_cannot_work_is_refused_with_advice(chart: Any, name: str) -> None:
    values, advice = COMBINATIONS[name]
    with pytest.raises(ValueError) as refusal:
        chart.render(values)
    assert advice in str(refusal.value)


def test_no_variable_says_what_the_chart_derives(chart: Any) -> None:
    for name in sorted(generate().DERIVED_SETTINGS):
        with pytest.raises(ValueError, match=f"extraEnv: SLIMPAJAMA_{name.upper()} would contradict"):
            chart.render(OPEN | {"extraEnv": [{"name": f"SLIMPAJAMA_{name.upper()}", "value": "1"}]})
    assert chart.render(OPEN | {"extraEnv": [{"name": "SLIMPAJAMA_MAX_SEQUENCES", "value": "1"}]})


def test_a_model_without_a_source_is_refused(chart: Any) -> None:
    with pytest.raises(ValueError, match=r"a has 0 sources \(\); give exactly one"):
        chart.render(OPEN | {"models": [{"name": "a"}]})


def test_an_image_volume_needs_a_cluster_that_has_them(chart: Any) -> None:
    values = OPEN | {"models": [{"name": "a", "image": {"reference": "b/c:1"}}]}
    with pytest.raises(ValueError, match=r"needs Kubernetes 1\.35 or later \(this is v1\.34\.0\)"):
        chart.render(values, kube_version="1.34.0")


def test_an_old_cluster_is_refused(chart: Any) -> None:
    with pytest.raises(ValueError, match=r"requires kubeVersion: >=1\.30\.0-0"):
        chart.render(OPEN, kube_version="1.29.0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auth": {"enabled": False, "singleKey": {"existingSecret": "a"}}}, "contradicts"),
        (OPEN | {"extraEnv": [{"name": "SLIMPAJAMA_API_KEY", "value": "in-the-open"}]}, "API_KEY would contradict"),
        (OPEN | {"settings": {"api_key": "in-the-open"}}, "api_key"),
    ],
    ids=["keys and none", "a key in the values", "a key in the ConfigMap"],
)
def test_a_single_key_has_its_secret_as_the_only_place(chart: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chart.render(values)


def test_every_rule_has_a_failing_case() -> None:
    num_rules = (CHART / "templates" / "_validate.tpl").read_text().count("{{- fail ")
    assert num_rules == len(COMBINATIONS) + 1, "the image volume's case has a test of its own"
