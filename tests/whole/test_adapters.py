"""Adapters beside their base and what they make of it: through HTTP, a killed worker and a change of versions."""

import asyncio
from pathlib import Path

import pytest
from shipped_adapter import write_shipped_adapter

from tests.whole.conftest import MakeService, Service

KEY = "root-key-0123"


async def answer(service: Service, model: str) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 30, "temperature": 0}
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


async def parents(service: Service) -> dict[str, str | None]:
    listed = (await service.client.get("/v1/models")).json()["data"]
    return {card["id"]: card["parent"] for card in listed}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--tensor-parallel-size", "2")], ids=["one-process", "two-ranks"])
async def test_an_adapter_answers_as_what_it_makes_of_its_base_whatever_happens_to_the_worker(
    make_service: MakeService, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    adapter, merged = write_shipped_adapter(tmp_path)
    (tmp_path / "admins").write_text(f"root:{KEY}\n")
    service = await make_service(
        *("--dtype", "float32", "--kv-cache-memory", "8MiB", "--admin-keys-file", str(tmp_path / "admins")),
        *arguments,
        models=(f"{adapter}=tuned@1", f"{merged}=merged", f"{tmp_path / 'base'}=plain"),
    )
    assert await parents(service) == {"tuned": "base", "merged": None, "plain": None}
    expected, before = await answer(service, "merged"), await answer(service, "plain")
    assert expected != before
    assert await answer(service, "tuned") == expected

    killed = service.worker.pid
    service.worker.kill()
    while (await service.metric("worker_restarts_total")) < 1:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await service.until_ready()
    assert service.worker.pid != killed
    assert await answer(service, "tuned") == expected

    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"source": str(adapter), "version": "tuned"}
    response = await service.client.post("/admin/models/plain", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["versions"][-1]["source"] == str(adapter)
    assert await answer(service, "plain") == expected
    assert (await parents(service))["plain"] == "base"
    await service.client.post("/admin/models/plain/rollback", headers=headers)
    assert await answer(service, "plain") == before

    lost = {"source": str(merged.parent / "lost"), "version": "lost"}
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "../base"}')
    response = await service.client.post("/admin/models/plain", json=lost, headers=headers)
    assert response.status_code != 200
    assert "IA3" in response.json()["error"]["message"]
    assert await answer(service, "plain") == before
