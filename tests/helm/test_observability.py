"""Alerts, dashboard and scalers name only series that the service has, and alerts fire when they should."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics

HELM = Path(__file__).parents[2] / "helm"
RULES = sorted((HELM / "rules").glob("*.yaml"))
DASHBOARDS = sorted((HELM / "dashboards").glob("*.json"))
ALERTS = {
    "SlimPajamaDown", "SlimPajamaNotLoaded", "SlimPajamaAbsent", "SlimPajamaErrors", "SlimPajamaQueueGrows",
    "SlimPajamaSlowFirstToken", "SlimPajamaWorkerRestarts", "SlimPajamaCacheExhausted", "SlimPajamaRejects",
}  # fmt: skip


def rule_entries() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def series_of_the_service() -> dict[str, set[str]]:
    """Series name to labels, from the service's own registry with one of everything bound."""
    metrics = Metrics()
    metrics.request_metrics(model="m", version="1", task="generate")
    metrics.model_metrics(model="m", version="1")
    metrics.model_loaded(model="m", version="1", architecture="a", dtype="d", device="cpu")
    metrics.http_request(endpoint="/", method="GET", status=200)
    metrics.rejected("draining")
    metrics.worker_restarted("exit")
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture
def promtool() -> str:
    unpacked = Path(sys.prefix) / "chart" / "prometheus" / "usr" / "bin" / "promtool"
    found = shutil.which("promtool") or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        pytest.skip("no promtool: `make chart-tools` unpacks Debian's prometheus")
    return found


@pytest.mark.parametrize("expression", [rule["expr"] for rule in rule_entries()] + dashboard_expressions())
def test_every_series_and_label_of_an_expression_exists(expression: str) -> None:
    series = series_of_the_service()
    recorded = {rule["record"] for rule in rule_entries() if "record" in rule}
    given_by_the_scrape = {"namespace", "job", "pod", "instance", "le"}
    named = set(re.findall(r"\bslimpajama[_:][a-z0-9_:]+", expression))
    assert named, expression
    assert named - recorded <= set(series)
    labels = set(re.findall(r"(\w+)=~?\"", expression)) | set(re.findall(r"(\w+)!~?\"", expression))
    for by in re.findall(r"by \(([^)]*)\)", expression):
        labels |= {label.strip() for label in by.split(",")}
    known = given_by_the_scrape.union(*(series[name] for name in named - recorded))
    assert labels <= known


def test_the_scalers_ask_for_series_that_exist(chart: Any) -> None:
    objects = chart.ci("keda-values.yaml")
    queries = [trigger["metadata"]["query"] for trigger in chart.only(objects, "ScaledObject")["spec"]["triggers"]]
    hpa = chart.only(chart.ci("hpa-values.yaml"), "HorizontalPodAutoscaler")
    named = {re.match(r"sum\((\w+)\{", query).group(1) for query in queries}  # type: ignore[union-attr]
    assert named == {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]}
    assert named <= set(series_of_the_service())


def test_a_scalers_pods_are_this_releases_alone(chart: Any) -> None:
    (query, _) = (
        trigger["metadata"]["query"]
        for trigger in chart.only(chart.ci("keda-values.yaml"), "ScaledObject")["spec"]["triggers"]
    )
    pattern = re.search(r'pod=~"([^"]*)"', query)
    assert pattern is not None
    assert re.fullmatch(pattern[1], "slimpajama-7d4b9c6f5d-x2x9z")
    assert not re.fullmatch(pattern[1], "slimpajama-canary-7d4b9c6f5d-x2x9z")


def test_the_chart_ships_rules_and_dashboards_as_they_are(chart: Any) -> None:
    objects = chart.ci("keda-values.yaml")
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    assert chart.only(objects, "PrometheusRule")["spec"] == {"groups": groups}
    for path in DASHBOARDS:
        found = chart.only_named(objects, "ConfigMap", f"slimpajama-{path.stem}")
        assert json.loads(found["data"][path.name]) == json.loads(path.read_text())


def test_every_alert_says_what_it_means_and_how_bad_it_is() -> None:
    alerts = {rule["alert"]: rule for rule in rule_entries() if "alert" in rule}
    assert set(alerts) == ALERTS
    for alert in alerts.values():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description"}


def test_prometheus_takes_the_rules(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", *map(str, RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    cases = Path(__file__).with_name("alerts_test.yaml")
    done = subprocess.run([promtool, "test", "rules", str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fired = {
        case["alertname"]
        for test in yaml.safe_load(cases.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == ALERTS, "every alert has a case in which it fires"


def test_dashboard_panels_do_not_overlap() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells
