"""The README's short tables of what was measured, made from the long ones in docs/. Measures nothing."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.peers.report import PRECISIONS

DOCS = Path(__file__).parents[2] / "docs"
UNNAMED_PROCESSOR = "AMX (Emerald Rapids)"
"""What sections of docs/peers.md are of whose titles name none."""
TARGET = 1.2
RATIO = re.compile(r"([\d.]+) \([\w .:]+\)")
LOAD = re.compile(r"(\d+) tokens, (\d+) a request, (\d+) clients")


def between(page: str, name: str) -> str:
    """What stands between the two marks of a name on a page of docs/."""
    text, begin = (DOCS / page).read_text(), f"<!-- {name} -->\n"
    first = text.index(begin) + len(begin)
    return text[first : text.index(f"<!-- /{name} -->", first)]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables' rows but their heads."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("|---") or line.startswith("| ---"):
            found.pop()  # the head
        elif line.startswith("|"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def table(head: str, found: list[list[str]]) -> str:
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *(f"| {' | '.join(cells)} |" for cells in found)])


def peer_sections() -> Iterator[tuple[str, str, str, str]]:
    """Of each section of docs/peers.md its processor, shape and precision, and its text; processor by processor."""
    sections = [section.partition("\n") for section in (DOCS / "peers.md").read_text().split("\n## ")[1:]]
    titles = [(*title.split(", "), f"on {UNNAMED_PROCESSOR}")[:3] for title, _, _ in sections]
    found = [
        (on.removeprefix("on "), shape, precision, text)
        for (shape, precision, on), (_, _, text) in zip(titles, sections, strict=True)
    ]
    shapes = list(dict.fromkeys(shape for _, shape, *_ in found))
    yield from sorted(found, key=lambda part: (part[0], shapes.index(part[1]), PRECISIONS.index(part[2])))


def ratios(cells: list[str]) -> list[str]:
    return [match[1] for cell in cells if (match := RATIO.fullmatch(cell))]


def generation() -> str:
    """Our throughput over the best peer's: a row for each processor and shape, in a cell all numbers of streams."""
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for processor, shape, precision, text in peer_sections():
        for row in rows(text):
            if row[0] == "**ours ÷ best peer**":
                cells[processor, shape][precision] = " / ".join(ratios(row[1:]))
    precisions = PRECISIONS[:3]
    return table(
        f"| processor | shape | {' | '.join(precisions)} |",
        [[*key, *(by.get(precision, "-") for precision in precisions)] for key, by in cells.items()],
    )


def embeddings() -> str:
    """The same of encoders: least and most over all loads, and by name the loads that miss the target."""
    lines = []
    for processor, shape, precision, text in peer_sections():
        loads = {row[0]: row[-1] for row in rows(text) if LOAD.fullmatch(row[0])}
        if loads:
            by_load = dict(zip(loads, ratios([*loads.values()]), strict=True))
            least, *_, most = sorted(by_load.values(), key=float)
            missed = _missed({load: float(ratio) for load, ratio in by_load.items() if float(ratio) < TARGET})
            lines.append([processor, shape, precision, f"{least} - {most}", f"{len(loads)}", missed])
    return table(f"| processor | encoder | precision | least - most | loads | below {TARGET} |", lines)


def _missed(found: dict[str, float]) -> str:
    """`16 x 1: 1, **32**`: tokens and texts a request, then the numbers of clients; bold where the peer is ahead."""
    clients = defaultdict(list)
    for load, ratio in found.items():
        tokens, texts, count = LOAD.fullmatch(load).groups()  # type: ignore[union-attr]
        clients[f"{tokens} x {texts}"].append(f"**{count}**" if ratio < 1 else count)
    return "; ".join(f"{what}: {', '.join(counts)}" for what, counts in clients.items()) or "none"


def costs() -> str:
    parts = [rows(between("performance.md", f"costs {name}")) for name in ("start", "deterministic")]
    lines = [[*row, "`make bench-costs`"] for part in parts for row in part]
    outside = {row[0]: row[4] for row in rows(between("performance.md", "numbers"))}
    what = f"time outside the network at {' / '.join(outside)} streams"
    return table("| what | found | command |", [*lines, [what, " / ".join(outside.values()), "`make bench`"]])


def gpu() -> str:
    text = between("performance.md", "gpu")
    card = re.match(r"`make bench-gpu`: ([^,]+),", text)
    assert card is not None
    found = [[what, measured, share, target] for what, measured, _, share, target in rows(text) if share]
    return table(f"| {card[1]} | measured | of the limit | target |", found)


def faults() -> str:
    """The laws' names by what came of them."""
    laws = defaultdict(list)
    for law, _, _, outcome in rows(between("faults.md", "chaos")):
        laws[outcome].append(f"`{law}`")
    return "\n".join(f"- {outcome}: {', '.join(names)}" for outcome, names in laws.items())


def kubernetes() -> str:
    chosen = [
        ("image for CPUs, unpacked", "image", "size, unpacked", "make image"),
        ("the same, locked up", "image", "as user 10001", "make image"),
        ("image for CUDA, unpacked", "image-cu13", "size, unpacked", "TORCH_VARIANT=cu13 make image"),
        ("pods replaced under load", "rolling", "pods replaced under load", "make rolling"),
        ("answers then that were not 2xx, or not whole", "rolling", "not 2xx, or not whole", "make rolling"),
    ]
    seen = {name: dict(rows(between("kubernetes.md", name))) for _, name, _, _ in chosen}
    found = [[what, seen[name][row], f"`{command}`"] for what, name, row, command in chosen]
    return table("| what | seen | command |", found)


TABLES = {
    "generation": generation,
    "embeddings": embeddings,
    "costs": costs,
    "gpu": gpu,
    "faults": faults,
    "kubernetes": kubernetes,
}
