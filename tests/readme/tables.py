"""The README's tables, made from the code and from docs/: `make readme` writes them, a test compares them."""

import sys
from pathlib import Path
from typing import Any, cast

from prometheus_client import Counter, Histogram

from service.app import create_app
from service.metrics import Metrics
from service.settings import Settings, setting_lines
from tests.readme import measured

README = Path(__file__).parents[2] / "README.md"


def settings_table() -> str:
    lines = ["| flag | environment | default | what |", "|---|---|---|---|"]
    for line in setting_lines():
        choices = f" ({', '.join(line.choices)})" if line.choices else ""
        lines.append(f"| `{line.flag}` | `{line.variable}` | {line.default} | {line.description}{choices} |")
    return "\n".join(lines)


def endpoints_table() -> str:
    app = create_app(Settings(), cast(Any, None))
    rows: dict[str, tuple[str, str]] = {}
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            rows[f"{method.upper()} {path}"] = (path, operation.get("summary", ""))
    lines = ["| endpoint | what |", "|---|---|"]
    lines += [f"| `{name}` | {summary} |" for name, (_, summary) in rows.items()]
    return "\n".join(lines)


def metrics_table() -> str:
    kinds = {Counter: "counter", Histogram: "histogram"}
    lines = ["| metric | kind | labels | what |", "|---|---|---|---|"]
    for metric in vars(Metrics()).values():
        name = getattr(metric, "_name", "")
        if isinstance(name, str) and name.startswith("slimpajama_"):
            kind = kinds.get(type(metric), "gauge")
            shown = f"{name}_total" if kind == "counter" else name
            labels = ", ".join(metric._labelnames) or "-"
            lines.append(f"| `{shown}` | {kind} | {labels} | {metric._documentation} |")
    return "\n".join(lines)


TABLES = {
    "settings": settings_table,
    "endpoints": endpoints_table,
    "metrics": metrics_table,
    **measured.TABLES,
}


def section(text: str, name: str) -> tuple[int, int]:
    """Where a table's text begins and ends in the README."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    return text.index(begin) + len(begin), text.index(end)


def write() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        first, last = section(text, name)
        text = f"{text[:first]}{table()}\n{text[last:]}"
    README.write_text(text)


if __name__ == "__main__":
    write()
    sys.stdout.write("README.md is up to date\n")
