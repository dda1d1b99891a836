"""Makes values.schema.json and the tables in README.md from values.yaml: `python helm/generate.py [--check]`.

A key's meaning is the comment `# -- ...` above it, its type follows from its default, or stands in `# @schema {...}`
where a default does not show it. The settings are those of `service.settings`. Runs at a developer's desk, never in a
cluster.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings, setting_lines

CHART = Path(__file__).parent
DERIVED_SETTINGS = {
    "config", "host", "port", "tls_certificate", "tls_key", "model", "adapter", "draft", "revision", "offline",
    "cache_dir", "device", "drain_timeout", "api_keys_file", "api_key", "admin_keys_file", "no_auth",
}  # fmt: skip
"""What other values of the chart say, each in one place alone."""

NAME = {"type": "string", "minLength": 1}
LABEL_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": ["string", "integer", "number"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}

KUBERNETES_VERSION = "v1.36.0"
KUBERNETES = {
    "podSecurityContext": "io.k8s.api.core.v1.PodSecurityContext",
    "securityContext": "io.k8s.api.core.v1.SecurityContext",
    "toleration": "io.k8s.api.core.v1.Toleration",
    "affinity": "io.k8s.api.core.v1.Affinity",
    "topologySpreadConstraint": "io.k8s.api.core.v1.TopologySpreadConstraint",
    "envVar": "io.k8s.api.core.v1.EnvVar",
    "volume": "io.k8s.api.core.v1.Volume",
    "volumeMount": "io.k8s.api.core.v1.VolumeMount",
    "container": "io.k8s.api.core.v1.Container",
    "networkPolicyPeer": "io.k8s.api.networking.v1.NetworkPolicyPeer",
    "networkPolicyEgressRule": "io.k8s.api.networking.v1.NetworkPolicyEgressRule",
}
"""Kinds of Kubernetes that values hold: our name, and that of its own definition."""
PARENT_REF = ("group", "kind", "name", "namespace", "sectionName")
"""Of the Gateway API, beside a port."""


def strict(properties: dict[str, Any], *, required: tuple[str, ...] = ()) -> dict[str, Any]:
    node: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**node, "required": list(required)} if required else node


def of_kubernetes() -> dict[str, Any]:
    """Kubernetes' own definitions of these kinds and of all that they hold, down to the last field.

    From the package kubernetes-validate (`make chart-tools`); without it, those that were committed.
    """
    package = importlib.util.find_spec("kubernetes_validate")
    if package is None or package.origin is None:
        committed = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))["definitions"]
        return {name: node for name, node in committed.items() if name.startswith("io.k8s.")}
    folder = Path(package.origin).parent / "kubernetes-json-schema" / f"{KUBERNETES_VERSION}-local-strict"
    known = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    found: dict[str, Any] = {}
    wanted = list(KUBERNETES.values())
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = without_descriptions(known[name])
            wanted += re.findall(r'"#/definitions/(io\.k8s\.[^"]+)"', json.dumps(found[name]))
    return dict(sorted(found.items()))


def without_descriptions(node: Any) -> Any:
    """A definition, with its references as draft-07 and this file have them."""
    if isinstance(node, list):
        return [without_descriptions(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("description", "format")}
    for key, value in kept.items():
        if key == "$ref":
            kept[key] = f"#/definitions/{value.rpartition('/')[2]}"
        elif key == "properties":
            kept[key] = {name: without_descriptions(part) for name, part in value.items()}
        else:
            kept[key] = without_descriptions(value)
    return kept


def definitions() -> dict[str, Any]:
    quantities = {"type": "object", "additionalProperties": {"$ref": "#/definitions/quantity"}}
    served_name = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"}
    pull_policy = {"enum": ["IfNotPresent", "Always", "Never"]}
    model = {
        "name": served_name,
        "version": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
        "path": {"type": "string", "pattern": "^/[^=@,]+$"},
        "hub": strict(
            {"repository": {"type": "string", "pattern": r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$"}, "revision": NAME},
            required=("repository",),
        ),
        "pvc": strict({"claimName": NAME, "path": {"type": "string"}}, required=("claimName",)),
        "image": strict(
            {"reference": NAME, "pullPolicy": pull_policy, "path": {"type": "string"}}, required=("reference",)
        ),
        "adapter": {"type": "boolean"},
        "draftFor": served_name,
    }
    return {
        "labels": LABEL_MAP,
        "annotations": LABEL_MAP,
        "names": {"type": "array", "items": strict({"name": NAME}, required=("name",))},
        "quantity": QUANTITY,
        "resources": strict({"requests": quantities, "limits": quantities}),
        "countOrPercent": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+%$"}]},
        **{name: {"$ref": f"#/definitions/{theirs}"} for name, theirs in KUBERNETES.items()},
        "parentRef": strict({**dict.fromkeys(PARENT_REF, NAME), "port": {"type": "integer"}}, required=("name",)),
        "models": {"type": "array", "minItems": 1, "items": strict(model, required=("name",))},
        "settings": strict(dict(setting_schemas())),
        **of_kubernetes(),
    }


def setting_schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """The service's own types and bounds; sizes are numbers of bytes or text like `2GiB`."""
    known = Settings.model_json_schema()["properties"]
    kept = {"type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "items"}
    for line in setting_lines():
        if line.field in DERIVED_SETTINGS:
            continue
        options = known[line.field].get("anyOf", [known[line.field]])
        types = [{key: value for key, value in option.items() if key in kept} for option in options]
        if "ByteSize" in str(Settings.model_fields[line.field]):
            types = [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9.]+ *[KMGT]?i?B?$"}]
        schema = types[0] if len(types) == 1 else {"anyOf": types}
        yield line.field, {**schema, "description": f"{line.description} (default: {line.default})"}


@dataclass(frozen=True)
class Entry:
    """One key of values.yaml."""

    path: tuple[str, ...]
    default: Any
    text: str
    schema: dict[str, Any] | None


def entries() -> list[Entry]:
    source = (CHART / "values.yaml").read_text(encoding="utf-8")
    return list(_entries(yaml.compose(source, yaml.SafeLoader), yaml.safe_load(source), source.splitlines(), ()))


def _entries(node: Any, values: Any, lines: list[str], path: tuple[str, ...]) -> Iterator[Entry]:
    for key, value in node.value:
        here, default = (*path, key.value), values[key.value]
        text, schema = _comment_above(lines, key.start_mark.line)
        is_section = isinstance(value, yaml.MappingNode) and value.value and schema is None
        if not is_section and not text:
            raise SystemExit(f"values.yaml: {'.'.join(here)} has no '# -- ' line above it")
        yield Entry(here, default, text, schema)
        if is_section:
            yield from _entries(value, default, lines, here)


def _comment_above(lines: list[str], line: int) -> tuple[str, dict[str, Any] | None]:
    comment: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        comment.insert(0, lines[line].strip().removeprefix("#").strip())
    schema = next((json.loads(part.removeprefix("@schema ")) for part in comment if part.startswith("@schema ")), None)
    words = [part for part in comment if not part.startswith("@schema ")]
    start = next((i for i, part in enumerate(words) if part.startswith("-- ")), None)
    return (" ".join(words[start:]).removeprefix("-- ") if start is not None else ""), schema


def schema_of(all_entries: list[Entry]) -> dict[str, Any]:
    root = strict({"global": {"type": "object", "description": "Set by Helm where this chart is part of another."}})
    nodes: dict[tuple[str, ...], dict[str, Any]] = {(): root}
    types = {bool: "boolean", int: "integer", str: "string"}
    for entry in all_entries:
        if entry.schema is None and isinstance(entry.default, dict):
            node = strict({})
        else:
            node = dict(entry.schema or {"type": types[type(entry.default)]})
        if entry.text:
            node = (
                {"allOf": [node], "description": entry.text} if "$ref" in node else {**node, "description": entry.text}
            )
        nodes[entry.path] = node
        nodes[entry.path[:-1]]["properties"][entry.path[-1]] = node
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart slimpajama"}
    return {**head, **root, "definitions": definitions()}


def table(all_entries: list[Entry]) -> str:
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for entry in all_entries:
        if entry.schema is None and isinstance(entry.default, dict) and not entry.text:
            continue
        default = json.dumps(entry.default).replace("|", "\\|")
        rows.append(f"| `{'.'.join(entry.path)}` | `{default}` | {entry.text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def settings_table() -> str:
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    rows += [
        f"| `{line.field}` | `{line.default}` | {line.description} |"
        for line in setting_lines()
        if line.field not in DERIVED_SETTINGS
    ]
    return "\n".join(rows)


def generated() -> dict[Path, str]:
    """What each generated file should hold now."""
    all_entries = entries()
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    for name, content in (("values", table(all_entries)), ("settings", settings_table())):
        begin, end = f"<!-- {name}: made by helm/generate.py -->", f"<!-- {name}: end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        readme, count = re.subn(pattern, lambda _, c=f"{begin}\n{content}\n{end}": c, readme, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md must hold {begin} and {end} once")
    return {
        CHART / "values.schema.json": json.dumps(schema_of(all_entries), indent=2) + "\n",
        CHART / "README.md": readme,
    }


def main() -> int:
    stale = [(path, text) for path, text in generated().items() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        if "--check" in sys.argv:
            sys.stderr.write(f"{path.name} is not what values.yaml says: run `make chart-files`\n")
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
