"""docs/defects.md names tests that there are."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([\w, ]+) \| (.+) \| `([\w/]+\.py)::(\w+)` \|$")
PEERS = {"TEI", "infinity", "KServe"}


def rows() -> list[tuple[str, str, str, str]]:
    lines = (ROOT / "docs" / "defects.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    found = [ROW.match(line) for line in table]
    assert None not in found, table[found.index(None)]
    return [match.groups() for match in found if match is not None]  # type: ignore[misc]


def test_every_defect_of_the_table_has_a_test_that_exists() -> None:
    named: dict[str, set[str]] = {}
    for _, _, path, name in rows():
        named.setdefault(path, set()).add(name)
    for path, names in named.items():
        tree = ast.parse((ROOT / path).read_text())
        defined = {entry.name for entry in tree.body if isinstance(entry, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert names <= defined, f"{path} has no {names - defined}"


def test_every_peer_is_there_and_no_defect_twice() -> None:
    assert {peer for peers, *_ in rows() for peer in peers.split(", ")} == PEERS
    defects = [defect for _, defect, _, _ in rows()]
    assert len(set(defects)) == len(defects) >= 50
