"""The tables of `make bench-peers`: medians, ratios to the best peer, and nobody left out without a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers import report
from tests.peers.report import read_groups, write_report

CELL = "128 in, 64 out, 4 streams"


def record(peer: str, rate: float, *, failed: int = 0, gap: float = 0.01) -> dict[str, Any]:
    spread = {"p50": gap, "p90": gap, "p99": 3 * gap}
    figures = {
        "output_tokens_per_second": rate,
        "items_per_second": rate / 64,
        "failed": failed,
        "errors": {"500: broken": failed},
        "first_token_seconds": spread,
        "inter_token_seconds": spread,
    }
    where = {"shape": "smollm2-135m", "precision": "bf16", "cell": CELL, "round": 0, "start_seconds": 2.0}
    return {"peer": peer, **where, "figures": figures}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return path


def test_the_ratio_is_of_medians_and_to_the_best_peer(tmp_path: Path) -> None:
    rates = {"slimpajama": (90, 120, 500), "slow": (10, 20, 30), "fast": (1, 100, 300)}
    records = [record(peer, rate) for peer, found in rates.items() for rate in found]
    (group,) = read_groups(write(tmp_path / "r.jsonl", *records))
    assert group.ratio(CELL) == (pytest.approx(1.2), "fast")


def test_a_peer_that_is_not_there_is_listed_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = {"peer": "gone", "shape": "smollm2-135m", "precision": "bf16", "unavailable": "no such package"}
    broken = record("broken", 1000.0, failed=3)
    path = write(tmp_path / "r.jsonl", record("slimpajama", 10.0), record("fast", 5.0), absent, broken)
    assert write_report(path, write=False) == 0
    text = capsys.readouterr().out
    assert "gone: no such package" in text
    assert "broken (128 in, 64 out, 4 streams): {'500: broken': 3}" in text
    assert "2.00 (fast)" in text


def test_latencies_are_milliseconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(write(tmp_path / "r.jsonl", record("slimpajama", 10.0, gap=0.02)), write=False)
    assert "| slimpajama | 20, 20.0 / 60 | 2 |" in capsys.readouterr().out


def texts(peer: str, rate: float, shape: str = "minilm") -> dict[str, Any]:
    cell = "16 tokens, 1 a request, 8 clients"
    return {**record(peer, 64 * rate), "shape": shape, "precision": "int8", "cell": cell}


def test_embeddings_are_held_against_the_best_of_all_and_the_best_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"slimpajama": 30.0, "infinity": 10.0, "in process: torch": 60.0}
    write_report(write(tmp_path / "r.jsonl", *(texts(peer, rate) for peer, rate in rates.items())), write=False)
    assert "| 30 (30-30) | 0.50 (in process: torch) | 3.00 (infinity) |" in capsys.readouterr().out


def test_what_was_not_measured_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    parts = [f"<!-- {name} -->\n<!-- /{name} -->" for name in report.KINDS]
    (tmp_path / "docs/performance.md").write_text("\n".join(parts))
    (tmp_path / "docs/peers.md").write_text("# Beside the peers\n\nAll.\n")
    (tmp_path / "docs/peers.json").write_text("[]")
    write_report(write(tmp_path / "r.jsonl", record("slimpajama", 10.0)), write=True)
    for rate in (20.0, 30.0):
        write_report(write(tmp_path / "r.jsonl", texts("slimpajama", rate)), write=True)
    write_report(write(tmp_path / "r.jsonl", texts("slimpajama", 40.0, "bert-base")), write=True)
    for path in ("docs/performance.md", "docs/peers.md"):
        text = (tmp_path / path).read_text()
        assert "| slimpajama | 10 (10-10) |" in text
        assert "| 30 (30-30) |" in text
        assert "| 40 (40-40) |" in text
        assert "20 (20-20)" not in text
    medians = json.loads((tmp_path / "docs/peers.json").read_text())
    assert [entry["rates"] for entry in medians] == [{"slimpajama": [rate]} for rate in (10.0, 30.0, 40.0)]
    assert {path.name for path in (tmp_path / "docs").glob("*.png")} == {"peers.png", "peers-embeddings.png"}
