"""What the chart tells the service is what the service's own loader reads, and means what the values say."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import package_version
from service.flags import read_serve_flags
from service.server import GRACE_SECONDS
from service.settings import Settings, load_settings

FILES = ("tls_certificate", "tls_key", "api_keys_file", "admin_keys_file")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SLIMPAJAMA_"):
            monkeypatch.delenv(name)


def loaded(chart: Any, objects: list[dict[str, Any]], scratch: Path) -> Settings:
    """Through the container's own arguments. Mounted files, which only a pod has, stand in for."""
    deployment = chart.only(objects, "Deployment")
    (arguments,) = (
        container["args"]
        for container in deployment["spec"]["template"]["spec"]["containers"]
        if container["name"] == "slimpajama"
    )
    flags = read_serve_flags(arguments)
    assert str(flags["config"]) == "/etc/slimpajama/config/service.yaml"
    config = yaml.safe_load(
        chart.only_named(objects, "ConfigMap", deployment["metadata"]["name"])["data"]["service.yaml"]
    )
    for name in FILES:
        if name in config:
            mounted = Path(config[name])
            assert mounted.is_relative_to("/etc/slimpajama")
            (scratch / name).write_text("a:aaaaaaaa")
            config[name] = str(scratch / name)
    path = scratch / "service.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_settings({"config": str(path)})


def test_the_service_reads_what_the_chart_writes(chart: Any, ci_name: str, tmp_path: Path) -> None:
    values = yaml.safe_load((chart.folder / "values.yaml").read_text())
    given = yaml.safe_load((chart.folder / "ci" / ci_name).read_text())
    settings = loaded(chart, chart.ci(ci_name), tmp_path)
    entries = given.get("models", values["models"])
    assert [source.name for source in settings.draft] == [entry["draftFor"] for entry in entries if "draftFor" in entry]
    served = [entry for entry in entries if "draftFor" not in entry]
    for sources, adapter in ((settings.model, False), (settings.adapter, True)):
        assert [source.name for source in sources] == [
            entry["name"] for entry in served if entry.get("adapter", False) == adapter
        ]
    assert settings.is_public
    assert settings.no_auth == (settings.api_keys_file is None)
    assert settings.offline
    for name, value in (values["settings"] | given.get("settings", {})).items():
        assert yaml.safe_load(str(getattr(settings, name))) == yaml.safe_load(str(value)) or name in (
            "kv_cache_memory",
            "cors_origins",
        )


def test_numbers_reach_the_service_as_numbers(chart: Any, tmp_path: Path) -> None:
    """Helm holds 2000000 as a float and would write 2e+06, which YAML takes for text."""
    settings = loaded(chart, chart.ci("cpu-min-values.yaml"), tmp_path)
    assert settings.max_queue_tokens == 2_000_000
    assert settings.max_request_timeout == 30.5
    assert settings.kv_cache_memory == 256 << 20


@pytest.mark.parametrize(
    ("cpus", "threads"), [("2", 2), (3, 3), ("500m", 1), ("2500m", 2), ("1.5", 1), (0.5, 1), (None, None)]
)
def test_threads_follow_the_cpus(chart: Any, tmp_path: Path, cpus: object, threads: int | None) -> None:
    values = {"auth": {"enabled": False}, "resources": {kind: {"cpu": cpus} for kind in ("requests", "limits")}}
    assert loaded(chart, chart.render(values), tmp_path).worker_threads == threads


@pytest.mark.parametrize(
    ("accelerator", "given", "size"),
    [
        ({"type": "nvidia", "count": 4}, {}, 4),
        ({"type": "nvidia", "count": 4}, {"tensor_parallel_size": 1}, 1),
        ({"type": "nvidia", "count": 1}, {}, 1),
        ({"type": "none", "count": 4}, {}, 1),
    ],
)
def test_decoders_are_divided_over_the_gpus_of_a_replica(
    chart: Any, tmp_path: Path, accelerator: dict[str, Any], given: dict[str, Any], size: int
) -> None:
    values = {"auth": {"enabled": False}, "accelerator": accelerator, "settings": given}
    assert loaded(chart, chart.render(values), tmp_path).tensor_parallel_size == size


def test_ranks_share_the_cpus(chart: Any, tmp_path: Path) -> None:
    """The setting counts threads of each rank."""
    cpus = {"resources": {kind: {"cpu": 6} for kind in ("requests", "limits")}}
    values = {"auth": {"enabled": False}, "settings": {"tensor_parallel_size": 2}} | cpus
    assert loaded(chart, chart.render(values), tmp_path).worker_threads == 3


def test_sources_become_folders_that_are_mounted(chart: Any) -> None:
    for name in ("pvc-values.yaml", "image-volume-values.yaml", "gpu-hub-values.yaml", "everything-values.yaml"):
        objects = chart.ci(name)
        deployment = chart.only(objects, "Deployment")
        config = chart.only_named(objects, "ConfigMap", deployment["metadata"]["name"])["data"]["service.yaml"]
        mounts = {
            mount["mountPath"] for mount in deployment["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        }
        for entry in yaml.safe_load(config)["model"]:
            folder = Path(entry.partition("=")[0])
            shipped = folder.is_relative_to("/models")
            assert shipped or any(str(parent) in mounts for parent in (folder, *folder.parents)), entry


def test_the_pods_grace_covers_the_servers_own(chart: Any) -> None:
    """15 s beyond preStop and drain: the server's last bytes, and 10 s for the worker."""
    assert GRACE_SECONDS + 10 <= 15


def test_the_image_is_that_of_this_package(chart: Any) -> None:
    meta = yaml.safe_load((chart.folder / "Chart.yaml").read_text())
    assert meta["appVersion"] == package_version()


def test_generated_files_are_up_to_date() -> None:
    path = Path(__file__).parents[2] / "helm" / "generate.py"
    spec = importlib.util.spec_from_file_location("chart_generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chart_generate"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    for made, text in module.generated().items():
        assert made.read_text() == text, f"{made.name}: run `make chart-files`"


def test_every_value_is_used_by_a_template(chart: Any) -> None:
    path = Path(__file__).parents[2] / "helm" / "templates"
    text = "\n".join(file.read_text() for file in path.rglob("*.*"))
    # Sections that templates hold in a variable, or pass on whole.
    for key, written in (
        ("$monitor", ".Values.metrics.podMonitor"),
        ("$keda", ".Values.autoscaling.keda"),
        ("$policy", ".Values.networkPolicy"),
        ("$picker", ".Values.inferencePool.endpointPicker"),
        ("$values", ".Values"),
        ("$numbers", ".Values.probes.startup"),
    ):
        text = text.replace(f"{key}.", f"{written}.")
    values = yaml.safe_load((path.parent / "values.yaml").read_text())
    whole = {
        "resources",
        "podSecurityContext",
        "securityContext",
        "settings",
        "labels",
        "annotations",
        "readiness",
        "liveness",
    }

    def leaves(section: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for name, value in section.items():
            if isinstance(value, dict) and value and name not in whole:
                found += leaves(value, f"{prefix}{name}.")
            else:
                found.append(f"{prefix}{name}")
        return found

    unused = [leaf for leaf in leaves(values, "") if f".Values.{leaf}" not in text]
    assert unused == ["probes.readiness", "probes.liveness"], "these two are reached by the loop over probes"
