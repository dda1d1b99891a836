"""What `serve run service.ray:app` is given, and how many replicas that comes to; no Ray cluster is started here."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.settings_sources import SettingsError

ray = pytest.importorskip("service.ray", reason="needs the extra slimpajama[ray]")

GIVEN = {"model": "a,checkpoints/b=c", "no_auth": "true"}


def test_arguments_are_the_services_own_settings_and_the_scaling() -> None:
    settings, scaling = ray.read_arguments(GIVEN | {"max_sequences": "7", "max_replicas": "3", "num_cpus": "4"})
    assert [source.name for source in settings.model] == ["a", "c"]
    assert (settings.max_sequences, settings.worker_threads, scaling.max_replicas) == (7, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"modle": "a"}, "unknown argument 'modle': did you mean 'model'?"),
        ({"no_auth": "true"}, "nothing to serve"),
        ({"model": "a"}, "give api_keys_file=..., or no_auth=true"),
        (GIVEN | {"port": "9000"}, "port is not ours to set: Ray's proxy listens"),
        (GIVEN | {"max_sequences": "many"}, "max_sequences = 'many'"),
        (GIVEN | {"max_replicas": "0"}, "max_replicas: Input should be greater than or equal to 1"),
        (GIVEN | {"min_replicas": "5"}, r"min_replicas \(5\) is more than max_replicas \(4\)"),
    ],
)
def test_a_wrong_argument_is_refused_with_advice(arguments: dict[str, str], advice: str) -> None:
    with pytest.raises(SettingsError, match=advice):
        ray.read_arguments(arguments)


@pytest.mark.parametrize(
    ("waiting", "running", "wanted"),
    [
        ({}, {}, 0),
        ({"a": 4.0}, {"a": 16.0}, 0.5),
        ({"a": 20.0, "b": 4.0}, {"a": 16.0, "b": 16.0}, 3.0),
        ({"a": 0.0, "b": 0.0}, {"a": 64.0, "b": 32.0}, 3.0),
    ],
)
def test_replicas_follow_the_gauge_that_needs_more_of_them(
    waiting: dict[str, float], running: dict[str, float], wanted: float
) -> None:
    policy = ray.WorkInHand(target_waiting=8, target_running=32)
    context: Any = SimpleNamespace(aggregated_metrics={"waiting": waiting, "running": running})
    assert policy(context)[0] == wanted


def test_before_any_replica_has_spoken_none_is_asked_for() -> None:
    """Ray holds the number within min_replicas and max_replicas."""
    assert ray.WorkInHand(8, 32)(SimpleNamespace(aggregated_metrics=None)) == (0, {})
