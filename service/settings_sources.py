"""Where settings come from beside flags: `SLIMPAJAMA_...` variables and a YAML file, each checked for misspelt names.

Knows names and files; what a value means is `service.settings`' own. Runs in the API process, before anything else.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

ENV_PREFIX = "SLIMPAJAMA_"

# Kubernetes sets these in every pod beside a Service called "slimpajama" (unless enableServiceLinks is false).
_SERVICE_LINK_NAME = re.compile(r"SLIMPAJAMA_(SERVICE_(HOST|PORT)(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_.+)?)")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(Exception):
    """The message is for the person who started the service, and says what to change."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key twice; the plain loader takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise SettingsError(f"'{key}' is given twice, the second time after line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """`unknown flag '--prot': did you mean '--port'?`"""
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"unknown {kind} '{name}'" + (f": did you mean '{nearest[0]}'?" if nearest else "")


def from_environment(environment: Mapping[str, str], fields: Iterable[str]) -> dict[str, str]:
    """The settings among the variables. An empty variable counts as unset: that is how a chart leaves one out."""
    names = {f"{ENV_PREFIX}{field.upper()}": field for field in fields}
    found: dict[str, str] = {}
    for variable, value in environment.items():
        if not variable.upper().startswith(ENV_PREFIX) or _is_service_link(variable, value):
            continue
        if variable not in names:
            raise SettingsError(unknown_name("variable", variable, names))
        if value.strip():
            found[names[variable]] = value.strip()
    return found


def _is_service_link(variable: str, value: str) -> bool:
    if variable == f"{ENV_PREFIX}PORT":
        return _SERVICE_LINK_VALUE.match(value) is not None
    return _SERVICE_LINK_NAME.fullmatch(variable) is not None


def from_yaml(path: Path, fields: Iterable[str]) -> dict[str, object]:
    """The settings in a YAML file; a key without a value counts as left out."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, SettingsError) as error:
        raise SettingsError(f"cannot read the settings in {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold `setting: value` lines, not a {type(content).__name__}")
    valid = [field for field in fields if field != "config"]
    for key in content:
        if key not in valid:
            raise SettingsError(f"{path}: {unknown_name('setting', str(key), valid)}")
    return {key: value for key, value in content.items() if value is not None}
