"""What every pod of every render keeps to: the restricted policy, resources, probes, names that fit together."""

import re
from collections.abc import Callable
from typing import Any

import pytest

Render = list[dict[str, Any]]
RESTRICTED_VOLUMES = {
    "configMap", "downwardAPI", "emptyDir", "projected", "secret", "csi", "persistentVolumeClaim", "ephemeral", "image",
}  # fmt: skip


def violations(pod: dict[str, Any]) -> list[str]:
    """The `restricted` level of Pod Security Standards, and a read-only root beyond it."""
    found = []
    context = pod.get("securityContext", {})
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    found += [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        found += [f"volume {kind}" for kind in kinds - RESTRICTED_VOLUMES]
    for container in containers:
        own = context | container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        rules = {
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "runAsNonRoot": own.get("runAsNonRoot") is True,
            "runAsUser": own.get("runAsUser") != 0,
            "seccompProfile": own.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": capabilities.get("drop") == ["ALL"],
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
            "procMount": own.get("procMount", "Default") == "Default",
            "probe host": "'host':" not in str([value for key, value in container.items() if key.endswith("Probe")]),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        }
        found += [f"{container['name']}: {rule}" for rule, kept in rules.items() if not kept]
    return found


def server(chart: Any, objects: Render) -> dict[str, Any]:
    (container,) = (
        container
        for container in chart.only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
        if container["name"] == "slimpajama"
    )
    return container


def test_every_pod_keeps_to_the_restricted_policy(chart: Any, rendered: Render) -> None:
    assert {name: violations(pod) for name, pod in chart.pods(rendered) if violations(pod)} == {}


@pytest.mark.parametrize(
    "breach",
    [
        lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"),
        lambda pod: pod["securityContext"].pop("runAsNonRoot"),
        lambda pod: pod["securityContext"].pop("seccompProfile"),
        lambda pod: pod["volumes"].append({"name": "a", "hostPath": {"path": "/"}}),
        lambda pod: pod.update(initContainers=[{"name": "a"}]),
    ],
)
def test_a_breach_of_the_policy_is_seen(chart: Any, breach: Callable[[dict[str, Any]], object]) -> None:
    pod = chart.only(chart.render({"auth": {"enabled": False}}), "Deployment")["spec"]["template"]["spec"]
    assert violations(pod) == []
    breach(pod)
    assert violations(pod)


def test_no_pod_carries_a_token_or_takes_service_links(chart: Any, rendered: Render) -> None:
    for name, pod in chart.pods(rendered):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name


def test_every_container_says_what_it_needs_and_which_image(chart: Any, rendered: Render) -> None:
    for _, pod in chart.pods(rendered):
        for container in chart.containers(pod):
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), container["name"]
            assert re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]), container["image"]


def test_every_mount_has_its_volume(chart: Any, rendered: Render) -> None:
    for name, pod in chart.pods(rendered):
        volumes = [volume["name"] for volume in pod.get("volumes", [])]
        assert len(volumes) == len(set(volumes)), name
        mounted = {mount["name"] for container in chart.containers(pod) for mount in container.get("volumeMounts", [])}
        assert mounted == set(volumes), name
        for container in chart.containers(pod):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            assert len(paths) == len(set(paths)), name


def test_gpus_are_requested_as_they_are_limited(chart: Any) -> None:
    container = server(chart, chart.ci("gpu-hub-values.yaml"))
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-cu13")


def test_probes_ask_three_different_questions(chart: Any, rendered: Render) -> None:
    container = server(chart, rendered)
    paths = [container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")]
    assert paths == ["/startupz", "/readyz", "/livez"]


def test_a_pod_is_killed_only_after_its_sleep_and_its_drain(chart: Any, rendered: Render) -> None:
    deployment = chart.only(rendered, "Deployment")
    container = server(chart, rendered)
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    config = chart.parse(
        chart.only_named(rendered, "ConfigMap", deployment["metadata"]["name"])["data"]["service.yaml"]
    )
    assert grace >= sleep + config[0]["drain_timeout"] + 15


def test_a_roll_out_is_given_longer_than_a_pod_may_take_to_start(chart: Any, rendered: Render) -> None:
    startup = server(chart, rendered)["startupProbe"]
    budget = startup["periodSeconds"] * startup["failureThreshold"]
    assert chart.only(rendered, "Deployment")["spec"]["progressDeadlineSeconds"] > budget


def test_selectors_find_the_pods_and_only_them(chart: Any, rendered: Render) -> None:
    deployment = chart.only(rendered, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for found in rendered:
        selector = found.get("spec", {}).get("selector") or found.get("spec", {}).get("podSelector")
        if selector is not None:
            wanted = selector.get("matchLabels", selector)
            assert wanted.items() <= labels.items(), found["kind"]
            for other in rendered:
                if other["kind"] == "Pod":
                    assert not wanted.items() <= other["metadata"]["labels"].items(), "the test's pod is no server"


def test_the_selector_outlives_every_upgrade(chart: Any) -> None:
    """A Deployment's selector can never be changed: nothing but the release's name may be in it."""
    selectors = {
        str(chart.only(chart.ci(name), "Deployment")["spec"]["selector"])
        for name in ("default-values.yaml", "cpu-min-values.yaml", "gpu-hub-values.yaml", "keda-values.yaml")
    }
    changed = {"auth": {"enabled": False}, "commonLabels": {"a": "b"}, "podLabels": {"c": "d"}, "image": {"tag": "9"}}
    selectors.add(str(chart.only(chart.render(changed), "Deployment")["spec"]["selector"]))
    assert len(selectors) == 1


def test_ports_are_known_by_the_names_that_others_use(chart: Any, rendered: Render) -> None:
    ports = {port["name"]: port["containerPort"] for port in server(chart, rendered)["ports"]}
    for found in rendered:
        match found["kind"]:
            case "Service":
                assert {port["targetPort"] for port in found["spec"]["ports"]} <= set(ports)
                assert all(len(port["name"]) <= 15 for port in found["spec"]["ports"])
            case "PodMonitor":
                assert {end["port"] for end in found["spec"]["podMetricsEndpoints"]} <= set(ports)
            case "NetworkPolicy":
                named = {port["port"] for rule in found["spec"]["ingress"] for port in rule["ports"]}
                assert named <= set(ports)
            case "InferencePool":
                assert [port["number"] for port in found["spec"]["targetPorts"]] == [ports["http"]]
            case "Ingress":
                (service,) = (other for other in rendered if other["kind"] == "Service")
                backends = [path["backend"] for rule in found["spec"]["rules"] for path in rule["http"]["paths"]]
                for backend in backends:
                    assert backend["service"]["name"] == service["metadata"]["name"]
                    assert backend["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}


def test_network_policy_lets_names_and_scrapes_through(chart: Any) -> None:
    policy = chart.only(chart.ci("netpol-tls-values.yaml"), "NetworkPolicy")["spec"]
    assert {(port["protocol"], port["port"]) for port in policy["egress"][0]["ports"]} == {("UDP", 53), ("TCP", 53)}
    sources = [source for rule in policy["ingress"] for source in rule["from"]]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}} in sources
    test_pod = {"app.kubernetes.io/instance": chart.release, "app.kubernetes.io/component": "test"}
    assert {"podSelector": {"matchLabels": test_pod}} in sources


def test_replicas_belong_to_the_autoscaler_once_there_is_one(chart: Any, rendered: Render) -> None:
    scaled = [found for found in rendered if found["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    deployment = chart.only(rendered, "Deployment")
    assert ("replicas" in deployment["spec"]) == (not scaled)
    for found in scaled:
        assert found["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_a_changed_setting_rolls_the_pods_and_an_equal_one_does_not(chart: Any) -> None:
    def checksum(values: dict[str, Any]) -> str:
        deployment = chart.only(chart.render({"auth": {"enabled": False}} | values), "Deployment")
        return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum({}) == checksum({"service": {"port": 81}})
    assert checksum({}) != checksum({"settings": {"max_sequences": 7}})


def test_only_the_init_container_sees_the_hubs_token(chart: Any) -> None:
    pod = chart.only(chart.ci("gpu-hub-values.yaml"), "Deployment")["spec"]["template"]["spec"]
    assert [env["name"] for env in pod["initContainers"][0]["env"] if "valueFrom" in env] == ["HF_TOKEN"]
    assert "HF_TOKEN" not in str(pod["containers"])


def test_a_single_key_is_a_variable_from_its_secret_and_enough(chart: Any) -> None:
    """The value itself is in no object that the chart makes."""
    values = {"auth": {"singleKey": {"existingSecret": "one"}}, "extraEnv": [{"name": "A", "value": "b"}]}
    objects = chart.render(values)
    variables = {entry["name"]: entry for entry in server(chart, objects)["env"]}
    assert variables["SLIMPAJAMA_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "one", "key": "api-key"}}
    assert variables["A"]["value"] == "b"
    deployment = chart.only(objects, "Deployment")
    config = chart.only_named(objects, "ConfigMap", deployment["metadata"]["name"])["data"]["service.yaml"]
    assert "api_keys_file" not in config
    assert "no_auth" not in config
    assert "api-keys" not in {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}


def test_init_containers_of_ones_own_come_after_the_models_are_fetched(chart: Any) -> None:
    more = {"extraInitContainers": [{"name": "prepare", "image": "a:1"}]}
    hub = {"models": [{"name": "a", "hub": {"repository": "b/c"}}]}
    for values, names in ((more, ["prepare"]), (more | hub, ["download", "prepare"])):
        deployment = chart.only(chart.render({"auth": {"enabled": False}} | values), "Deployment")
        assert [each["name"] for each in deployment["spec"]["template"]["spec"]["initContainers"]] == names
