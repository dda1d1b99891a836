"""Generation end to end: real weights, processes and sockets; the same text whatever happens in the meantime."""

import asyncio
import signal
from typing import Any

import openai
import pytest

from tests.whole.conftest import MakeService, Service, complete, stream, streamed

ARGUMENTS = {
    "defaults": (),
    "chunks-of-7": ("--max-batch-tokens", "7"),
    "cache-so-small-that-it-preempts": ("--kv-cache-memory", "800KiB"),
}


async def until(service: Service, name: str, least: float) -> None:
    """Polls a metric; the test's own time limit bounds it."""
    while await service.metric(name) < least:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def check(choice: dict[str, Any], case: dict[str, Any]) -> None:
    """Ids and text are the reference's, log-probabilities nearly so."""
    assert (choice["text"], choice["token_ids"]) == (case["text"], case["new_ids"])
    assert choice["finish_reason"] == "length"
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(case["new_ids"])
    assert sum(found) == pytest.approx(case["sum_logprob"], abs=1e-3)
    assert found[:5] == pytest.approx(case["first5_logprobs"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
async def test_every_reference_case_comes_out_exactly_alone_and_in_a_crowd_cold_and_warm_streamed_and_not(
    make_service: MakeService, cases: list[dict[str, Any]], arguments: tuple[str, ...]
) -> None:
    service = await make_service(*arguments)
    wanted = {"logprobs": 0, "return_token_ids": True}
    for _ in ("cold", "warm"):
        for case in cases:
            answer = await complete(service, case, **wanted)
            check(answer["choices"][0], case)
            assert answer["usage"]["completion_tokens"] == len(case["new_ids"])
            whole, done = await streamed(service, case, **wanted)
            check(whole, case)
            assert done
    crowd = cases * 16
    answers = asyncio.gather(*(complete(service, case, **wanted) for case in crowd[::2]))
    streams = await asyncio.gather(*(streamed(service, case, **wanted) for case in crowd))
    for answer, case in zip(await answers, crowd[::2], strict=True):
        check(answer["choices"][0], case)
    for (whole, done), case in zip(streams, crowd, strict=True):
        check(whole, case)
        assert done
    if "--kv-cache-memory" in arguments:
        assert await service.metric("preemptions_total") > 0


@pytest.mark.slow
async def test_streams_go_on_in_the_same_response_when_the_worker_is_killed(
    make_service: MakeService, cases: list[dict[str, Any]]
) -> None:
    service = await make_service()
    crowd = cases * 8
    tasks = [asyncio.ensure_future(stream(service, case)) for case in crowd]
    await until(service, "generated_tokens_total", 300)
    service.worker.send_signal(signal.SIGKILL)
    assert await asyncio.gather(*tasks) == [(case["text"], "length", True) for case in crowd]
    assert await service.metric("worker_restarts_total") == 1
    accepted, ended = await service.metric("requests_accepted_total"), await service.metric("request_outcomes_total")
    assert accepted == ended == len(crowd)


@pytest.mark.slow
async def test_a_client_that_leaves_in_mid_stream_frees_its_blocks(
    make_service: MakeService, cases: list[dict[str, Any]]
) -> None:
    service = await make_service("--no-prefix-caching")
    body = {"prompt": "Once upon a time", "max_tokens": 450, "stream": True, "ignore_eos": True}
    async with service.client.stream("POST", "/v1/completions", json=body) as response:
        await response.aiter_lines().__anext__()
        assert await service.metric("requests_running") == 1
    await until(service, "request_outcomes_total", 1)
    assert await service.metric("request_outcomes_total", outcome="cancelled") == 1
    await complete(service, cases[0])
    assert await service.metric("kv_cache_usage") == 0
    assert await service.metric("requests_running") == 0


@pytest.mark.slow
async def test_sigterm_under_load_loses_nothing_and_exits_with_zero(
    make_service: MakeService, cases: list[dict[str, Any]]
) -> None:
    service = await make_service()
    tasks = [asyncio.ensure_future(stream(service, case)) for case in cases * 4]
    await until(service, "generated_tokens_total", 50)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.gather(*tasks) == [(case["text"], "length", True) for case in cases * 4]
    assert await asyncio.to_thread(service.process.wait, 30) == 0


@pytest.mark.slow
async def test_the_openai_client_drives_the_real_service(
    make_service: MakeService, cases: list[dict[str, Any]]
) -> None:
    service = await make_service()
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        names = [model.id async for model in client.models.list()]
        assert names == ["stories"]
        case = cases[1]
        answer = await client.completions.create(
            model="stories", prompt=case["prompt"], max_tokens=20, temperature=0, logprobs=2, seed=1
        )
        assert case["text"].startswith(answer.choices[0].text)
        pieces = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(
                model="stories", prompt=case["prompt"], max_tokens=20, temperature=0, stream=True
            )
        ]
        assert "".join(pieces) == answer.choices[0].text
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        bound = await client.completions.create(
            model="stories",
            prompt="x",
            max_tokens=400,
            extra_body={"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        )
        assert bound.choices[0].text.replace(" ", "").replace("\n", "") in ('{"n":1}', '{"n":2}')
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="stories", prompt="x", max_tokens=10_000)
        assert caught.value.param == "max_tokens"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nobody", prompt="x")
