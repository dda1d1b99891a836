"""Every value has an effect: a file of helm/ci changes it, and without that change something else is rendered."""

import copy
from collections.abc import Iterator
from typing import Any

import yaml

Path = tuple[str, ...]

RELAXED: dict[Path, Any] = {
    ("podSecurityContext", "runAsNonRoot"): False,
    ("securityContext", "allowPrivilegeEscalation"): True,
    ("securityContext", "readOnlyRootFilesystem"): False,
    ("securityContext", "capabilities", "drop"): [],
}
"""What no file of helm/ci may change, as all of them keep to the restricted policy."""


def changed_leaves(given: dict[str, Any], defaults: Any, path: Path = ()) -> Iterator[Path]:
    """What differs from values.yaml, down to where values.yaml has no further keys."""
    for name, value in given.items():
        default = defaults.get(name) if isinstance(defaults, dict) else None
        if isinstance(value, dict) and isinstance(default, dict) and default:
            yield from changed_leaves(value, default, (*path, name))
        elif value != default:
            yield (*path, name)


def leaves(section: dict[str, Any], path: Path = ()) -> Iterator[Path]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


def without(values: dict[str, Any], path: Path) -> dict[str, Any]:
    left = copy.deepcopy(values)
    section = left
    for name in path[:-1]:
        section = section[name]
    del section[path[-1]]
    return left


def test_every_value_has_an_effect(chart: Any) -> None:
    defaults = yaml.safe_load((chart.folder / "values.yaml").read_text())
    with_effect: set[Path] = set()
    for file in sorted((chart.folder / "ci").iterdir()):
        given = yaml.safe_load(file.read_text())
        for path in changed_leaves(given, defaults):
            if path in with_effect:
                continue
            try:
                rendered = chart.render(without(given, path))
            except ValueError:  # refused: the value is what makes the combination possible
                with_effect.add(path)
                continue
            if rendered != chart.ci(file.name):
                with_effect.add(path)
    for path, value in RELAXED.items():
        values: Any = value
        for name in reversed(path):
            values = {name: values}
        if chart.render({"auth": {"enabled": False}} | values) != chart.ci("default-values.yaml"):
            with_effect.add(path)
    without_effect = set(leaves(defaults)) - with_effect
    assert {".".join(path) for path in without_effect} == set()
