"""`slimpajama calibrate` against a service on a real socket: the file that it writes and that the next start reads."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from model.calibration import read_calibration
from model.description import fingerprint
from model.gguf.folder import unpacked
from service.app import create_app
from service.calibrate import main
from service.settings import Settings
from service.tasks.confidence import softmax

LABELS = ["a", "b", "c"]
GGUF = Path(__file__).parents[2] / "reference/gguf/bert.gguf.gz"


@pytest.fixture
def app(engine: Any) -> FastAPI:
    return create_app(Settings(), engine)


@pytest.fixture
def overconfident(make_classifier: Any) -> Path:
    folder: Path = make_classifier(LABELS, scale=0.5)[0]
    return folder


async def examples(client: httpx.AsyncClient, temperature: float) -> str:
    """Texts whose labels are drawn as the classifier would have it at that temperature."""
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "film", "good", "bad", "hill", "mat", "sat", "very", "not", "ran", "far"]
    texts = [" ".join(generator.choice(words, size=6)) for _ in range(600)]
    rows = (await client.post("/v1/classify", json={"input": texts, "raw_scores": True})).json()["data"]
    lines = []
    for text, row in zip(texts, rows, strict=True):
        logits = np.array([entry["score"] for entry in row["labels"]])
        drawn = generator.choice(len(logits), p=softmax(logits / temperature))
        lines.append(json.dumps({"text": text, "label": row["labels"][drawn]["label"]}))
    return "\n".join(lines) + "\n"


async def test_the_temperature_of_the_data_is_found_and_served(
    overconfident: Path, engine: Any, client: httpx.AsyncClient, base_url: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine.load(overconfident, "before")
    version = fingerprint(overconfident)
    data = tmp_path / "data.jsonl"
    data.write_text(await examples(client, 5.0))
    arguments = ["--url", base_url, "--data", str(data), "--folder", str(overconfident)]
    assert await asyncio.to_thread(main, arguments) == 0
    assert "temperature" in capsys.readouterr().out
    calibration = read_calibration(overconfident, version)
    assert calibration.temperature["classifier"] == pytest.approx(5.0, rel=0.25)
    report = calibration.fitted_on["classifier"]
    assert report["n"] == 600
    assert report["checkpoint_version"] == version == fingerprint(overconfident)
    for name in ("ece", "nll", "brier"):
        assert report[name]["after"] < report[name]["before"]
    engine.load(overconfident, "after")
    [entry] = (await client.post("/v1/classify", json={"input": ["good film"], "model": "after"})).json()["data"]
    assert entry["calibrated"] is True
    assert entry["confidence"] < entry["score"]


async def test_what_was_fitted_on_some_labels_is_not_claimed_for_others(
    make_model: Any, engine: Any, client: httpx.AsyncClient, base_url: str, tmp_path: Path
) -> None:
    """A temperature fitted on two labels made every answer about any labels `calibrated`."""
    folder = make_model("BertModel")[0]
    engine.load(folder, "before")
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"the {word} sat", "label": ("cat", "dog")[at % 2]} for at, word in enumerate(LABELS * 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--url", base_url, "--data", str(data), "--folder", str(folder), "--labels", "data"]
    assert await asyncio.to_thread(main, arguments) == 0
    engine.load(folder, "after")
    for labels, more, expected in (
        (["cat", "dog"], {}, True),
        (["dog", "cat"], {}, True),
        (["cat", "film"], {}, False),
        (["cat", "dog"], {"hypothesis_template": "not {}"}, False),
        (["cat", "dog"], {"multi_label": True}, False),
    ):
        body = {"input": "a good film", "model": "after", "labels": labels, **more}
        [entry] = (await client.post("/v1/classify", json=body)).json()["data"]
        assert entry["calibrated"] is expected, body


async def test_a_gguf_file_is_calibrated_and_reads_it_at_the_next_start(
    engine: Any, client: httpx.AsyncClient, base_url: str, tmp_path: Path
) -> None:
    """The file was written with the version of the file's folder, and nobody read it there."""
    file = tmp_path / "model.gguf"
    file.write_bytes(gzip.decompress(GGUF.read_bytes()))
    data = tmp_path / "data.jsonl"
    rows = [{"text": word, "label": ("lion", "mouse")[at % 2]} for at, word in enumerate(LABELS * 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--url", base_url, "--data", str(data), "--folder", str(file), "--labels", "data"]
    arguments += ["--hypothesis-template", "{}"]
    with unpacked(file) as folder:
        engine.load(folder, "before")
        assert await asyncio.to_thread(main, arguments) == 0
    with unpacked(file) as folder:
        engine.load(folder, "after")
        body = {"input": "the lion", "model": "after", "labels": ["lion", "mouse"]}
        body["hypothesis_template"] = "{}"
        [entry] = (await client.post("/v1/classify", json=body)).json()["data"]
    assert entry["calibrated"] is True


async def test_a_folder_that_is_not_there_is_said_so_before_anything_is_asked(
    base_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("missing.gguf", "missing"):
        arguments = ["--url", base_url, "--data", str(tmp_path / "none"), "--folder", str(tmp_path / name)]
        assert await asyncio.to_thread(main, arguments) == 1
        assert f"{name} is neither a folder nor a GGUF file" in capsys.readouterr().err


async def test_several_labels_of_a_text_are_read_where_they_do_not_exclude_each_other(
    make_classifier: Any, engine: Any, base_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.load(make_classifier(LABELS, "several", problem_type="multi_label_classification")[0])
    engine.load(make_classifier(LABELS, "one")[0])
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"the {word} sat", "labels": LABELS[: at % 4]} for at, word in enumerate(LABELS * 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, code in (("several", 0), ("one", 1)):
        folder = tmp_path / name
        arguments = ["--url", base_url, "--data", str(data), "--folder", str(folder), "--model", name]
        assert await asyncio.to_thread(main, arguments) == code
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("", "fewer than 10"),
        ("x\n" * 12, "line 1: not JSON"),
        ('{"text": "cat"}\n' * 12, "line 1: expected"),
        ('{"text": "cat", "label": "z"}\n' * 12, "no label 'z'; it has: "),
        (None, "cannot read"),
    ],
)
async def test_data_that_cannot_be_used_is_said_so(
    content: str | None, advice: str, overconfident: Path, engine: Any, base_url: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine.load(overconfident)
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    arguments = ["--url", base_url, "--data", str(data), "--folder", str(overconfident)]
    assert await asyncio.to_thread(main, arguments) == 1
    assert advice in capsys.readouterr().err
    assert not (overconfident / "calibration.json").exists()


async def test_a_service_that_is_not_there_is_said_so(
    overconfident: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "cat", "label": "a"}\n' * 12)
    arguments = ["--url", "http://127.0.0.1:1", "--data", str(data), "--folder", str(overconfident)]
    assert await asyncio.to_thread(main, arguments) == 1
    assert "does not answer" in capsys.readouterr().err
