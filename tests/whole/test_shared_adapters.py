"""Adapters over one base through HTTP: together as alone, over a worker's death, coming and going while it serves."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.service.engine.shared_adapters import write_folders
from tests.whole.conftest import MakeService, Service

KEY = "root-key-0123"
HEADERS = {"Authorization": f"Bearer {KEY}"}
NAMES = ("base", "one", "two")
SERVED = ("--dtype", "float32", "--kv-cache-memory", "8MiB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    (root / "admins").write_text(f"root:{KEY}\n")
    return write_folders(root)


def arguments(folders: dict[str, Path], *adapters: str) -> tuple[str, ...]:
    given = [part for name in adapters for part in ("--adapter", f"{folders[name]}={name}")]
    return (*SERVED, "--admin-keys-file", str(folders["base"].parent / "admins"), *given)


async def stream(service: Service, model: str, prompt: str, *, max_tokens: int = 40) -> tuple[str, str | None]:
    """The text of a stream, and the model that its events name."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.7, "seed": 3, "stream": True}
    text, named, last = "", None, ""
    async with service.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                text += event["choices"][0]["text"] if event["choices"] else ""
                named = event["model"]
    assert last == "data: [DONE]"
    return text, named


async def post(service: Service, path: str, body: dict[str, Any], *, status: int = 200) -> str:
    response = await service.client.post(path, json=body, headers=HEADERS)
    assert response.status_code == status, response.text
    return response.text


async def test_adapters_and_base_answer_together_as_alone_and_a_killed_worker_costs_nothing(
    make_service: MakeService, folders: dict[str, Path]
) -> None:
    service = await make_service(*arguments(folders, "one", "two"), models=(f"{folders['base']}=base",))
    listed = (await service.client.get("/v1/models")).json()["data"]
    assert {card["id"]: card["parent"] for card in listed} == {"base": None, "one": "base", "two": "base"}
    assert [card["kv_cache_bytes"] == 0 for card in listed] == [False, True, True]
    assert listed[1]["weight_bytes"] < listed[0]["weight_bytes"] / 4
    asked = [(name, prompt) for prompt in ("Once upon a time", "The fox", "A dog and") for name in NAMES]
    expected = [await stream(service, *one) for one in asked]
    assert [named for _, named in expected] == list(NAMES) * 3
    once = [await service.metric("generated_tokens_total", model=name) for name in NAMES]
    assert len({text for text, _ in expected}) == len(asked)
    together = await asyncio.gather(*[stream(service, *one) for one in asked])
    assert together == expected
    streams = [asyncio.ensure_future(stream(service, *one)) for one in asked]
    before = await service.metric("generated_tokens_total")
    while await service.metric("generated_tokens_total") < before + 20:  # noqa: ASYNC110
        await asyncio.sleep(0)
    service.worker.kill()
    assert await asyncio.gather(*streams) == expected
    assert await service.metric("worker_restarts_total") == 1
    assert await service.metric("requests_replayed_total") > 0
    assert [await service.metric("generated_tokens_total", model=name) / 3 for name in NAMES] == once


async def test_an_adapter_comes_and_goes_while_its_base_serves(
    make_service: MakeService, folders: dict[str, Path]
) -> None:
    service = await make_service(*arguments(folders, "one"), models=(f"{folders['base']}=base",))
    expected = await stream(service, "one", "Once")
    load = {"lora_name": "later", "lora_path": str(folders["one"])}
    response = await service.client.post("/v1/load_lora_adapter", json=load)
    assert response.status_code == 401
    assert "added successfully" in await post(service, "/v1/load_lora_adapter", load)
    assert (await stream(service, "later", "Once"))[0] == expected[0]
    await post(service, "/v1/load_lora_adapter", load, status=400)
    other = await stream(service, "base", "Once")
    replaced = load | {"lora_path": str(folders["two"]), "load_inplace": True}
    await post(service, "/v1/load_lora_adapter", replaced)
    now = (await stream(service, "later", "Once"))[0]
    assert now not in (expected[0], other[0])
    await post(service, "/v1/load_lora_adapter", replaced)  # the same files again
    asked = asyncio.ensure_future(stream(service, "later", "Once", max_tokens=200))
    await asyncio.sleep(0.05)
    await post(service, "/v1/unload_lora_adapter", {"lora_name": "later"})
    await post(service, "/v1/load_lora_adapter", replaced | {"load_inplace": False})
    assert (await asked)[0].startswith(now)
    assert (await stream(service, "later", "Once"))[0] == now
    refused = await post(service, "/v1/load_lora_adapter", replaced | {"lora_name": "base"}, status=409)
    assert "'base' is the name of a checkpoint" in refused
    refused = await post(service, "/admin/models/two", {"source": str(folders["merged"]), "adapter": True}, status=409)
    assert "is no LoRA adapter" in refused
    refused = await post(
        service, "/admin/models/two", {"source": str(folders["two"]), "adapter": True, "dtype": "bfloat16"}, status=409
    )
    assert "dtype: an adapter has its base's" in refused

    # The base cannot be taken away under them; a new version of it leaves them where they are.
    response = await service.client.delete("/admin/models/base", headers=HEADERS)
    assert response.status_code == 409
    assert "is the base of one@" in response.text
    await post(service, "/admin/models/base", {"source": str(folders["merged"]), "version": "new"})
    assert (await stream(service, "one", "Once"))[0] == expected[0]
    assert (await stream(service, "base", "Once"))[0] == expected[0]
    service.worker.kill()
    assert (await stream(service, "later", "Once"))[0] == now

    for name in ("later", "one"):
        await post(service, "/v1/unload_lora_adapter", {"lora_name": name})
        response = await service.client.post("/v1/completions", json={"model": name, "prompt": "Once"})
        assert response.status_code == 404
    await post(service, "/v1/unload_lora_adapter", {"lora_name": "base"}, status=404)
    while len((await service.client.get("/admin/models", headers=HEADERS)).json()["data"]) > 1:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def test_an_adapter_whose_folder_has_gone_fails_alone_when_the_worker_dies(
    make_service: MakeService, folders: dict[str, Path], tmp_path: Path
) -> None:
    """It took the whole service with it: all that is served had to be loaded again."""
    service = await make_service(*arguments(folders, "two"), models=(f"{folders['base']}=base",))
    expected = [await stream(service, name, "Once") for name in ("base", "two")]
    folder, elsewhere = tmp_path / "later", tmp_path / "elsewhere"
    shutil.copytree(folders["one"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    await post(service, "/v1/load_lora_adapter", {"lora_name": "later", "lora_path": str(folder)})
    body = {"model": "later", "prompt": "Once", "max_tokens": 3}
    assert (await service.client.post("/v1/completions", json=body)).status_code == 200
    folder.rename(elsewhere)
    service.worker.kill()
    assert [await stream(service, name, "Once") for name in ("base", "two")] == expected
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 503, response.text
    assert "could not be loaded again" in response.text
    assert (await service.client.get("/readyz")).status_code == 200
    elsewhere.rename(folder)
    service.worker.kill()
    assert [await stream(service, name, "Once") for name in ("base", "two")] == expected
    assert (await service.client.post("/v1/completions", json=body)).status_code == 200


async def test_grammars_and_chats_hold_for_adapters(make_service: MakeService, folders: dict[str, Path]) -> None:
    service = await make_service(*arguments(folders, "one"), models=(f"{folders['base']}=base",))
    body = {"model": "one", "prompt": "A number:", "max_tokens": 8, "regex": "[0-9]{3}"}
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"].isdigit()
    for parameters, status in (({"adapter_id": "one"}, 200), ({"adapter_id": "base"}, 400)):
        answer = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 12} | parameters}
        response = await service.client.post("/generate", json=answer)
        assert response.status_code == status, response.text
        if status == 200:
            greedy = {"model": "one", "prompt": answer["inputs"], "max_tokens": 12, "temperature": 0}
            expected = (await service.client.post("/v1/completions", json=greedy)).json()["choices"][0]["text"]
            assert response.json()["generated_text"] == expected
        else:
            assert response.json()["error"]["message"].endswith("adapters: one")
    chat = {"model": "one", "messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 5}
    response = await service.client.post("/v1/chat/completions", json=chat)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == "one"
