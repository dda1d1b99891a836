"""Tables, plots and JSON of what `run.py` has kept: medians over rounds, and our ratio to the best peer of each cell.

Latest results count: of each server and cell the last rounds that were kept in the file. What is written replaces what
there was of the same shapes and precisions, and leaves the rest. Knows no servers.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = "slimpajama"
KINDS = {"peers": True, "peers-embeddings": False}
"""Names of the parts of docs/performance.md and of the plots, and whether they are about generation."""
IN_PROCESS = "in process"
PRECISIONS = ("bf16", "int8", "int4", "fp32")


@dataclass(slots=True)
class Group:
    """All that was measured of one shape at one precision: figures by cell and server, and reasons of those missing."""

    shape: str
    precision: str
    figures: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)

    @property
    def is_generation(self) -> bool:
        return any("streams" in cell for cell in self.figures)

    @property
    def servers(self) -> list[str]:
        found = dict.fromkeys(peer for peers in self.figures.values() for peer in peers)
        return sorted(found, key=lambda name: (name != OURS, list(found).index(name)))

    def rates(self, cell: str, server: str) -> list[float]:
        name = "output_tokens_per_second" if self.is_generation else "items_per_second"
        return [f[name] for f in self.figures[cell].get(server, []) if not f["failed"] and f[name]]

    def rate(self, cell: str, server: str) -> float | None:
        rates = self.rates(cell, server)
        return statistics.median(rates) if rates else None

    def latency(self, cell: str, server: str, kind: str, percent: str) -> float | None:
        values = [f[kind][percent] for f in self.figures[cell].get(server, []) if not f["failed"]]
        known = [value for value in values if value is not None]
        return statistics.median(known) * 1000 if known else None

    def best_peer(self, cell: str, *, server: bool = False) -> tuple[str, float] | None:
        """`server` leaves out what runs in process."""
        peers = [name for name in self.servers if name != OURS and not (server and name.startswith(IN_PROCESS))]
        rates = {name: self.rate(cell, name) for name in peers}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        return max(known.items(), key=lambda entry: entry[1]) if known else None

    def ratio(self, cell: str, *, server: bool = False) -> tuple[float, str] | None:
        """Ours over the best peer's, and who that is."""
        ours, best = self.rate(cell, OURS), self.best_peer(cell, server=server)
        return (ours / best[1], best[0]) if ours and best else None


def read_groups(path: Path) -> list[Group]:
    groups: dict[tuple[str, str], Group] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        key = (record["shape"], record["precision"])
        group = groups.setdefault(key, Group(*key))
        if "unavailable" in record:
            where = f" ({record['cell']})" if "cell" in record else ""
            group.missing[record["peer"] + where] = record["unavailable"]
            continue
        rounds = group.figures.setdefault(record["cell"], {}).setdefault(record["peer"], [])
        if record["figures"]["failed"]:
            group.missing[f"{record['peer']} ({record['cell']})"] = str(record["figures"].get("errors"))
            continue
        rounds.append(record["figures"])
        group.missing.pop(record["peer"], None)
        group.starts[record["peer"]] = record["start_seconds"]
    return _in_order(groups.values())


def read_medians(path: Path) -> list[Group]:
    """What the docs hold, rates alone."""
    groups: dict[tuple[str, str], Group] = {}
    for entry in json.loads(path.read_text()):
        key = (entry["shape"], entry["precision"])
        rates = {
            server: [{"output_tokens_per_second": rate, "items_per_second": rate, "failed": 0} for rate in found]
            for server, found in entry["rates"].items()
        }
        groups.setdefault(key, Group(*key)).figures[entry["load"]] = rates
    return _in_order(groups.values())


def _in_order(groups: Iterable[Group]) -> list[Group]:
    """Generation first, shapes in the order in which they came, then by precision."""
    groups = list(groups)
    shapes = list(dict.fromkeys(group.shape for group in groups))
    return sorted(groups, key=lambda g: (not g.is_generation, shapes.index(g.shape), PRECISIONS.index(g.precision)))


def write_report(path: Path, *, write: bool) -> int:
    groups = read_groups(path)
    full = {_title(group): _full(group) for group in groups}
    sys.stdout.write("\n\n".join([_summary(groups), *full.values()]) + "\n")
    if write:
        _write_sections(ROOT / "docs/peers.md", full)
        _write_medians(ROOT / "docs/peers.json", _medians(groups))
        known = read_medians(ROOT / "docs/peers.json")
        missing = {(group.shape, group.precision): group.missing for group in groups}
        for group in known:
            group.missing = missing.get((group.shape, group.precision), {})
        for name, generating in KINDS.items():
            chosen = [group for group in known if group.is_generation == generating]
            if any(group.is_generation == generating for group in groups):
                _write_between(ROOT / "docs/performance.md", name, _summary(chosen))
                _plot(chosen, ROOT / f"docs/{name}.png")
    return 0


def _write_between(path: Path, name: str, table: str) -> None:
    text = path.read_text()
    begin = f"<!-- {name} -->\n"
    first, last = text.index(begin) + len(begin), text.index(f"<!-- /{name} -->")
    path.write_text(f"{text[:first]}{table}\n{text[last:]}")


def _write_sections(path: Path, found: dict[str, str]) -> None:
    head, *sections = path.read_text().rstrip().split("\n\n## ")
    kept = {f"## {section.splitlines()[0]}": f"## {section}" for section in sections} | found
    path.write_text("\n\n".join([head, *kept.values()]) + "\n")


def _write_medians(path: Path, found: list[dict[str, Any]]) -> None:
    """Replaces all that was of the same shapes and precisions."""
    new = {(entry["shape"], entry["precision"]) for entry in found}
    kept = [entry for entry in json.loads(path.read_text()) if (entry["shape"], entry["precision"]) not in new]
    path.write_text(json.dumps(kept + found, indent=1) + "\n")


def _summary(groups: list[Group]) -> str:
    """A part of docs/performance.md: of generation everybody's throughput, of embeddings our ratio to the best peer."""
    parts = []
    for group in (group for group in groups if group.is_generation):
        parts += [
            f"**{group.shape}, {group.precision}**: output tokens/s",
            "",
            *_rate_rows(group),
            "",
            *_reasons(group),
        ]
    rows = [
        f"| {group.shape} | {group.precision} | {cell} | {_rate_text(group, cell, OURS)} "
        f"| {_ratio_text(group, cell)} | {_ratio_text(group, cell, server=True)} |"
        for group in groups
        if not group.is_generation
        for cell in group.figures
    ]
    if rows:
        names = ("encoder", "precision", "load", "ours, texts/s", "ours ÷ best peer", "ours ÷ best server")
        head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        parts += ["**Embeddings**", "", *head, *rows]
        parts += [line for group in groups if not group.is_generation for line in _reasons(group)]
    return "\n".join(parts).strip()


def _rate_rows(group: Group) -> list[str]:
    cells = list(group.figures)
    lines = ["| server | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    texts = {server: [_rate_text(group, cell, server) for cell in cells] for server in group.servers}
    lines += [f"| {server} | {' | '.join(found)} |" for server, found in texts.items()]
    return [*lines, "| **ours ÷ best peer** | " + " | ".join(_ratio_text(group, cell) for cell in cells) + " |"]


def _rate_text(group: Group, cell: str, server: str) -> str:
    rates = group.rates(cell, server)
    if not rates:
        return "-"
    return f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


def _ratio_text(group: Group, cell: str, *, server: bool = False) -> str:
    found = group.ratio(cell, server=server)
    return "-" if found is None else f"{found[0]:.2f} ({found[1]})"


def _reasons(group: Group) -> list[str]:
    return [f"Missing at {group.shape}, {group.precision}: {peer}: {why}" for peer, why in group.missing.items()]


def _title(group: Group) -> str:
    return f"## {group.shape}, {group.precision}"


def _full(group: Group) -> str:
    """Everything of a group: throughput, latencies, seconds to start."""
    lines = [_title(group), ""]
    lines += ["Output tokens/s: median (least-most)." if group.is_generation else "Texts/s: median (least-most).", ""]
    lines += _rate_rows(group) if group.is_generation else _turned(group)
    if group.is_generation:
        lines += ["", "Milliseconds to the first token (median), between tokens (median / 99th percentile):", ""]
        cells = list(group.figures)
        lines += ["| server | " + " | ".join(cells) + " | start, s |", "|---|" + "---|" * (len(cells) + 1)]
        for server in group.servers:
            texts = [_latency_text(group, cell, server) for cell in cells]
            lines.append(f"| {server} | " + " | ".join(texts) + f" | {group.starts.get(server, 0):.0f} |")
    return "\n".join([*lines, "", *_reasons(group)]).strip()


def _turned(group: Group) -> list[str]:
    """Embeddings have more loads than servers: a row for each load."""
    lines = [
        "| load | " + " | ".join(group.servers) + " | ours ÷ best peer |",
        "|---|" + "---|" * (len(group.servers) + 1),
    ]
    for cell in group.figures:
        texts = [_rate_text(group, cell, server) for server in group.servers]
        lines.append(f"| {cell} | " + " | ".join(texts) + f" | {_ratio_text(group, cell)} |")
    return lines


def _latency_text(group: Group, cell: str, server: str) -> str:
    first = group.latency(cell, server, "first_token_seconds", "p50")
    gaps = [group.latency(cell, server, "inter_token_seconds", percent) for percent in ("p50", "p99")]
    if first is None or gaps[0] is None or gaps[1] is None:
        return "-"
    return f"{first:.0f}, {gaps[0]:.1f} / {gaps[1]:.0f}"


def _medians(groups: list[Group]) -> list[dict[str, Any]]:
    return [
        {
            "shape": group.shape,
            "precision": group.precision,
            "load": cell,
            "rates": {server: group.rates(cell, server) for server in group.servers},
            "ratio_to_best_peer": group.ratio(cell),
        }
        for group in groups
        for cell in group.figures
    ]


def _plot(groups: list[Group], path: Path) -> None:
    """A panel for each group: rate by load, a line for each server, ours drawn thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(groups) // 2)
    width = 13 if groups[0].is_generation else 18  # embeddings have three times the loads
    figure, axes = pyplot.subplots(rows, 2, figsize=(width, 4.2 * rows), squeeze=False)
    colours: dict[str, Any] = defaultdict(lambda: f"C{len(colours)}")
    for axis, group in zip(axes.flat, groups, strict=False):
        _draw(axis, group, colours.__getitem__)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw(axis: Any, group: Group, colour: Callable[[str], Any]) -> None:
    cells = list(group.figures)
    for server in group.servers:
        known = [(x, rate) for x, cell in enumerate(cells) if (rate := group.rate(cell, server))]
        thick = 3.0 if server == OURS else 1.2
        axis.plot(*zip(*known, strict=True), marker="o", label=server, linewidth=thick, color=colour(server))
    axis.set_title(f"{group.shape}, {group.precision}")
    axis.set_ylabel("output tokens/s" if group.is_generation else "texts/s (log)")
    if not group.is_generation:
        axis.set_yscale("log")
    labels = [cell.replace(", ", "\n", 2) if group.is_generation else cell.replace(", ", "\n") for cell in cells]
    axis.set_xticks(range(len(cells)), labels, fontsize=6)
    axis.set_ylim(bottom=0 if group.is_generation else None)
    axis.legend(fontsize=7)
