"""A draft behind HTTP: the same answers sooner, over a worker's death, and with the versions that come and go."""

import asyncio
import json
from pathlib import Path

import pytest
from shipped_adapter import write_shipped_adapter

from tests.service.engine.drafted import write_deep, write_shallow
from tests.whole.conftest import ROOT, MakeService, Service

KEY = "root-key-0123"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPTS = ("The fox and the crow", "In the city of London", "Once there was a king who", "A list of names:")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, what guesses for it nearly always right, and what guesses badly."""
    root = tmp_path_factory.mktemp("drafts")
    (root / "admins").write_text(f"root:{KEY}\n")
    return {
        "deep": write_deep(root / "deep", 16),
        "good": write_shallow(root / "good"),
        "bad": write_shallow(root / "bad", 1),
    }


async def answer(service: Service, prompt: str, *, temperature: float = 0.0) -> str:
    """The text of a stream."""
    body = {
        "model": "lm",
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": temperature,
        "seed": 3,
        "stream": True,
        "stop": [" and"],
    }
    text, last = "", ""
    async with service.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += choices[0]["text"] if choices else ""
    assert last == "data: [DONE]"
    return text


async def answers(service: Service) -> list[str]:
    """Alone, then all at once: the same."""
    asked = [(prompt, temperature) for prompt in PROMPTS for temperature in (0.0, 0.8)]
    alone = [await answer(service, prompt, temperature=temperature) for prompt, temperature in asked]
    together = await asyncio.gather(*[answer(service, prompt, temperature=heat) for prompt, heat in asked])
    assert together == alone
    return alone


def arguments(folders: dict[str, Path], draft: str) -> tuple[str, ...]:
    keys = str(folders["deep"].parent / "admins")
    return ("--dtype", "float32", "--admin-keys-file", keys, "--draft", f"{folders[draft]}=lm")


@pytest.mark.parametrize("draft", ["good", "bad"])
async def test_answers_are_those_without_a_draft_and_a_killed_worker_costs_nothing(
    make_service: MakeService, folders: dict[str, Path], draft: str
) -> None:
    plain = await make_service("--dtype", "float32", models=(f"{folders['deep']}=lm",))
    expected = await answers(plain)
    service = await make_service(*arguments(folders, draft), models=(f"{folders['deep']}=lm",))
    assert await answers(service) == expected
    guessed, right = [await service.metric(f"{kind}_tokens_total") for kind in ("draft", "accepted_draft")]
    assert guessed > 0
    assert right <= guessed
    if draft == "good":
        assert right > 0.8 * guessed
    assert await service.metric("weight_bytes") > await plain.metric("weight_bytes")
    asked = [asyncio.ensure_future(answers(service)) for _ in range(2)]
    before = await service.metric("generated_tokens_total")
    while await service.metric("generated_tokens_total") < before + 20:  # noqa: ASYNC110
        await asyncio.sleep(0)
    service.worker.kill()
    assert await asyncio.gather(*asked) == [expected] * 2
    assert await service.metric("worker_restarts_total") == 1
    assert await service.metric("requests_replayed_total") > 0


async def deploy(service: Service, *, status: int = 200, **body: object) -> str:
    response = await service.client.post("/admin/models/lm", json=body, headers=HEADERS)
    assert response.status_code == status, response.text
    return response.text


async def drafts(service: Service) -> dict[str, str | None]:
    """What guesses for each version."""
    cards = (await service.client.get("/admin/models", headers=HEADERS)).json()["data"][0]["versions"]
    return {card["version"]: card["draft"] for card in cards if card["state"] == "ready"}


async def test_a_draft_comes_and_goes_with_versions_of_its_name(
    make_service: MakeService, folders: dict[str, Path]
) -> None:
    deep, good, bad = (str(folders[name]) for name in ("deep", "good", "bad"))
    service = await make_service(*arguments(folders, "good"), models=(f"{deep}=lm@1",))
    expected = await answers(service)
    await deploy(service, source=deep, version="2")
    assert (await drafts(service))["2"] == good
    assert await answers(service) == expected
    assert await service.metric("draft_tokens_total", version="2") > 0
    await deploy(service, source=deep, version="3", draft="")
    assert (await drafts(service))["3"] is None
    assert await answers(service) == expected
    assert await service.metric("draft_tokens_total", version="3") == 0
    await deploy(service, source=deep, version="4", draft=bad)
    assert (await drafts(service))["4"] == bad
    assert await answers(service) == expected
    response = await service.client.post("/admin/models/lm/rollback", headers=HEADERS)
    assert response.status_code == 200, response.text
    assert (await drafts(service)).get("3", "gone") is None
    encoder = str(ROOT / "checkpoints/slimpajama-tiny-encoder")
    refused = await deploy(service, source=deep, version="5", draft=encoder, status=409)
    assert "it is no decoder that generates" in refused
    assert await answers(service) == expected


async def test_adapters_over_a_drafted_checkpoint_answer_as_without(make_service: MakeService, tmp_path: Path) -> None:
    write_shipped_adapter(tmp_path)
    base, adapter = f"{tmp_path / 'base'}=base", f"{tmp_path / 'adapter'}=lm"
    given = ("--dtype", "float32", "--adapter", adapter)
    plain = await make_service(*given, models=(base,))
    service = await make_service(*given, "--draft", base, models=(base,))
    expected = await answers(plain)
    assert await answers(service) == expected
    assert await service.metric("draft_tokens_total") > 0
