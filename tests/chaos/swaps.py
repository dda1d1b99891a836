"""Versions swapped under load: no request fails, no answer mixes versions, the memory returns to what it was.

The second version is the shipped language model with the weights of one layer negated: the same shapes, other texts.
"""

import argparse
import asyncio
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.chaos.law import Row, check_books
from tests.chaos.service import ENCODER, LANGUAGE_MODEL, Service, Stream, running
from tests.chaos.work import ask_single_pass, body_of

NUM_PROMPTS = 40
TOKENS = 40
CALLERS = 16
KV_CACHE = "48MiB"
MAX_GROWTH = 0.02


def other_version(folder: Path) -> Path:
    target = folder / "other"
    shutil.copytree(LANGUAGE_MODEL, target, dirs_exist_ok=True)
    weights = load_file(LANGUAGE_MODEL / "model.safetensors")
    negated = sorted(name for name in weights if name.endswith("down_proj.weight"))[-1]
    weights[negated] = (-weights[negated].float()).to(weights[negated].dtype)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


async def swaps(options: argparse.Namespace, log: Path) -> Row:
    row = Row(f"{options.count or 20} hot swaps between two versions under {CALLERS} callers")
    sources = {"a": LANGUAGE_MODEL, "b": other_version(log.parent)}
    models = (f"{LANGUAGE_MODEL}=lm@a", f"{ENCODER}=encoder")
    async with running(log, "--kv-cache-memory", KV_CACHE, models=models) as service:
        texts = {"a": await _texts(service)}
        await _swap(service, row, "b", sources["b"])
        texts["b"] = await _texts(service)
        await _swap(service, row, "a", sources["a"])
        await _settle(service)
        before = service.rss_bytes()
        stopping = asyncio.Event()
        callers = [asyncio.create_task(_call(service, caller, stopping, texts, row)) for caller in range(CALLERS)]
        for turn in range(options.count or 20):
            await asyncio.sleep(0.3)
            version = "b" if turn % 2 == 0 else "a"
            await _swap(service, row, version, sources[version])
        stopping.set()
        num_answers = sum(await asyncio.gather(*callers))
        await _settle(service)
        after = service.rss_bytes()
        growth = [last / first - 1 for first, last in zip(before, after, strict=True)]
        row.found += [
            f"{num_answers:,} answers, each of one version",
            f"memory {growth[0]:+.1%} (API process), {growth[1]:+.1%} (worker, of {before[1] / 2**20:.0f} MiB)",
        ]
        row.check(max(map(abs, growth)) <= MAX_GROWTH, "memory does not return")
        await check_books(service, row)
    return row


async def _texts(service: Service) -> list[str]:
    """What the version that serves now says to each prompt; asked alone, so that nothing else shares its steps."""
    return [(await service.stream(**body_of(number, TOKENS))).text for number in range(NUM_PROMPTS)]


async def _swap(service: Service, row: Row, version: str, source: Path) -> None:
    response = await service.admin("POST", "/lm", {"source": str(source), "version": version})
    row.check(response.status_code == 200, f"a swap failed: {response.status_code} {response.text[:200]}")
    while len((await service.admin("GET", "")).json()["data"][0]["versions"]) > 1:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await _until_freed(service)


async def _until_freed(service: Service) -> None:
    """Until the worker holds no version but the one that serves: it says so in its log."""
    while True:
        text = service.log.read_text()
        if text.count('"checkpoint unloaded"') == text.count('"version in service"'):
            return
        await asyncio.sleep(0.05)


async def _call(service: Service, caller: int, stopping: asyncio.Event, texts: dict[str, list[str]], row: Row) -> int:
    num_answers = 0
    while not stopping.is_set():
        number = (caller * 7 + num_answers) % NUM_PROMPTS
        num_answers += 1
        if caller % 4 == 3:
            fault = await ask_single_pass(service, number)
            row.check(not fault, fault)
            continue
        stream = await service.stream(**body_of(number, TOKENS))
        row.check(stream.complete, f"a stream failed: {stream.status} {stream.error}")
        row.check(_is_of_one(stream, number, texts), "an answer mixes versions")
    return num_answers


def _is_of_one(stream: Stream, number: int, texts: dict[str, list[str]]) -> bool:
    """The text is the one that the version gives which the answer says it is of."""
    return stream.version in texts and stream.text == texts[stream.version][number]


async def _settle(service: Service) -> None:
    """The same use of every part before memory is measured: each block of the cache written, each task asked."""
    for turn in range(12):
        streams = await asyncio.gather(*(service.stream(**body_of(10_000 + 64 * turn + n, 120)) for n in range(64)))
        assert all(stream.complete for stream in streams)
    for number in range(32):
        await ask_single_pass(service, number)
    await service.until_idle()
