"""Writes rows of a table from standard input into README.md: `summary.py NAME`, between `<!-- NAME -->` and its end."""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def write(name: str, rows: list[str]) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    table = "\n".join([begin, "| what | seen |", "|---|---|", *rows, end])
    text, count = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: table, README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"README.md must hold {begin} and {end} once")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], sys.stdin.read().splitlines())
