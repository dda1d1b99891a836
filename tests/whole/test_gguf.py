"""GGUF files served as their users have them: completions, chat, vectors, a killed worker, and nothing left behind."""

import asyncio
import gzip
import json
import math
import signal
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.whole.conftest import ROOT, MakeService

RECORDED = ROOT / "tests/reference/gguf"
IDS = [3, 17, 5, 24, 30, 12, 9, 31, 2, 28, 30, 7]


def unzip(name: str, folder: Path) -> Path:
    path = folder / f"{name}.gguf"
    path.write_bytes(gzip.decompress((RECORDED / f"{name}.gguf.gz").read_bytes()))
    return path


@pytest.mark.slow
async def test_gguf_files_answer_survive_their_worker_and_leave_nothing_behind(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    models = tuple(str(unzip(name, tmp_path)) for name in ("bpe-smollm", "bert"))
    service = await make_service("--dtype", "float32", models=models)
    assert [model["id"] for model in (await service.client.get("/v1/models")).json()["data"]] == ["bpe-smollm", "bert"]

    expected = load(gzip.decompress((RECORDED / "expected.safetensors.gz").read_bytes()))["bpe-smollm.output"][-1]
    body = {"prompt": IDS, "max_tokens": 1, "temperature": 0, "logprobs": 0, "return_token_ids": True}

    async def first_token() -> None:
        response = await service.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        assert choice["token_ids"] == [int(expected.argmax())]
        logprob = float(expected.log_softmax(-1).max())
        assert math.isclose(choice["logprobs"]["token_logprobs"][0], logprob, abs_tol=1e-4)

    await first_token()
    chat = {"messages": [{"role": "user", "content": "the lion"}], "max_tokens": 4, "stream": True}
    async with service.client.stream("POST", "/v1/chat/completions", json=chat) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert response.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
    vector = (await service.client.post("/v1/embeddings", json={"model": "bert", "input": "the lion"})).json()
    assert math.isclose(math.hypot(*vector["data"][0]["embedding"]), 1, abs_tol=1e-5)

    service.worker.send_signal(signal.SIGKILL)
    await first_token()
    assert await service.metric("worker_restarts_total") == 1
    assert len(list(temporary.glob("slimpajama-gguf-*"))) == 2
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 60) == 0
    assert not list(temporary.glob("slimpajama-gguf-*"))
