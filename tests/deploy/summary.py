"""Writes a table's rows from standard input into docs/kubernetes.md: `summary.py NAME`, between NAME's two marks."""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/kubernetes.md"


def write(name: str, rows: list[str]) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    table = "\n".join([begin, "| what | seen |", "|---|---|", *rows, end])
    text, count = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: table, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE.name} must hold {begin} and {end} once")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], sys.stdin.read().splitlines())
