"""`make chaos`: faults injected for real under load, and what came of it as a table; `--write`: into docs/faults.md.

Each law has its file beside this one, and a run of its own: it checks the law and the metrics' sums. The exit code
tells whether all held.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from tests.chaos.clients import clients
from tests.chaos.drains import drains
from tests.chaos.fuzz import fuzz
from tests.chaos.kills import kills
from tests.chaos.law import Row
from tests.chaos.overload import overload
from tests.chaos.schemas import schemas
from tests.chaos.service import ROOT
from tests.chaos.soak import soak
from tests.chaos.swaps import swaps

FAULTS = ROOT / "docs/faults.md"
BEGIN, END = "<!-- chaos -->\n", "<!-- /chaos -->"
HEAD = ["| law | run | found | held? |", "|---|---|---|---|"]
RUNS: dict[str, Callable[[argparse.Namespace, Path], Awaitable[Row]]] = {
    "kills": kills,
    "overload": overload,
    "drains": drains,
    "swaps": swaps,
    "fuzz": fuzz,
    "schemas": schemas,
    "soak": soak,
    "clients": clients,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=RUNS, action="append", help="may be repeated; default: all")
    parser.add_argument("--count", type=int, help="faults, swaps or requests; default: each law's own full size")
    parser.add_argument("--streams", type=int, default=64, help="at a time")
    parser.add_argument("--step-timeout", type=float, default=2.0, help="seconds; on a crowded machine more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="folder that keeps the service's logs")
    parser.add_argument("--write", action="store_true", help="write the rows into the table of docs/faults.md")
    options = parser.parse_args()
    rows = asyncio.run(_run(options))
    lines = {name: f"| {name} {row}" for name, row in rows.items()}
    sys.stdout.write(os.linesep.join(["", *HEAD, *lines.values(), ""]))
    if options.write:
        FAULTS.write_text(with_rows(FAULTS.read_text(), lines))
    return 1 if any(row.faults for row in rows.values()) else 0


def with_rows(text: str, lines: dict[str, str]) -> str:
    """The page with these rows, by law, in its table; those of laws that were not run stay."""
    first, last = text.index(BEGIN) + len(BEGIN), text.index(END)
    former = {line.split("|")[1].strip(): line for line in text[first:last].splitlines() if line.startswith("|")}
    kept = [lines.get(name) or former.get(name) for name in RUNS]
    return text[:first] + "\n".join([*HEAD, *(line for line in kept if line is not None)]) + "\n" + text[last:]


async def _run(options: argparse.Namespace) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        for name in options.only or RUNS:
            try:
                rows[name] = await RUNS[name](options, logs / f"{name}.log")
            except (RuntimeError, OSError, httpx.HTTPError, AssertionError) as error:
                rows[name] = Row(name, faults=[f"{type(error).__name__}: {error}"])
            sys.stdout.write(f"{rows[name]}{os.linesep}")
            sys.stdout.flush()
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
