"""`slimpajama batch` with a service of its own: every request of a file is answered, and again only what was not."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.whole.conftest import ROOT

MODEL = ROOT / "checkpoints" / "slimpajama-tiny-lm"


def batch(source: Path, target: Path, *serve_flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "service", "batch", "--input", str(source), "--output", str(target)]
    return subprocess.run([*command, "--", *serve_flags], cwd=ROOT, capture_output=True, text=True, timeout=120)


def requests(path: Path, bodies: list[Any]) -> Path:
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    return {line["custom_id"]: line["response"] for line in map(json.loads, path.read_text().splitlines())}


def test_a_file_of_requests_is_answered_by_a_service_that_runs_for_it(tmp_path: Path) -> None:
    bodies = [{"prompt": f"Tale {number}: once", "max_tokens": 4} for number in range(8)] + [{"prompt": 3}]
    source, target = requests(tmp_path / "requests.jsonl", bodies), tmp_path / "answers.jsonl"
    first = batch(source, target, "--model", str(MODEL))
    assert first.returncode == 0, first.stderr
    assert first.stderr.endswith("slimpajama batch: 8 200, 1 400\n")
    found = answers(target)
    assert all(found[str(number)]["body"]["usage"]["completion_tokens"] == 4 for number in range(8))
    assert found["8"]["status_code"] == 400
    assert batch(source, target, "--model", "/nowhere").returncode == 0  # nothing is left to be asked
    target.write_text("".join(target.read_text().splitlines(keepends=True)[:5]))
    again = batch(source, target, "--model", "/nowhere")
    assert again.returncode == 1
    assert "4 of them without an answer" in again.stderr
    assert again.stderr.endswith("slimpajama batch: the service has ended with 3\n")
    assert len(answers(target)) == 5


def test_its_service_ends_with_a_batch_that_is_told_to_end(tmp_path: Path) -> None:
    bodies = [{"prompt": f"Tale {number}: once", "max_tokens": 200} for number in range(500)]
    source, target = requests(tmp_path / "requests.jsonl", bodies), tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "service", "batch", "--input", str(source), "--output", str(target)]
    process = subprocess.Popen([*command, "--", "--model", str(MODEL)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not target.exists() or not target.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    (server,) = psutil.Process(process.pid).children()
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; the same command goes on" in told
    assert not server.is_running()
    assert 0 < len(answers(target)) < 500
