"""Checkpoints that are loaded together share the memory for KV blocks, whichever comes first."""

import time
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors import safe_open

from service.engine import cache_budget
from service.engine.cache_budget import Neighbours
from service.engine.progress import ProgressClock, StepBound
from service.engine.protocol import Loaded, ModelSpec, WorkerConfig
from service.engine.worker import Worker
from tests.service.engine.conftest import ENCODER, ENCODER_KEY, KEY, STORIES, MakeEngine
from tests.service.engine.test_worker import Connection

pytestmark = [
    pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K checkpoint is not in ../shared/data"),
    pytest.mark.skipif(not ENCODER.is_dir(), reason="needs checkpoints/slimpajama-tiny-encoder"),
]

BLOCK_TOKENS = 16
TOKEN_BYTES = 2 * 5 * 4 * 8 * 4
"""Of stories260K: keys and values, layers, heads, values of a head, bytes."""


def spec(name: str, folder: Path = STORIES, **fields: Any) -> ModelSpec:
    return ModelSpec(key=f"{name}@1", folder=str(folder), **fields)


def num_values(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return count


def test_models_of_a_start_share_what_cpus_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each had a GiB of its own, and a pod as large as its limit allows for one was killed with two."""
    monkeypatch.setattr(cache_budget, "CPU_CACHE_BYTES", 8 << 20)
    connection = Connection()
    worker = Worker(cast(Any, connection), ProgressClock.create(), StepBound(60.0), lambda: None)
    models = [spec("one"), spec("encoder", ENCODER), spec("fixed", kv_cache_bytes=1 << 20), spec("two")]
    connection.inbox = [WorkerConfig(models=models)]
    until = time.monotonic() + 60
    while len(worker._lanes) < len(models):
        assert time.monotonic() < until
        worker._drain_inbox()
    held = {message.model: message.kv_cache_bytes for message in connection.said if isinstance(message, Loaded)}
    block = BLOCK_TOKENS * TOKEN_BYTES
    assert held["encoder@1"] == 0
    assert held["one@1"] == held["two@1"]
    assert (4 << 20) - block < held["one@1"] <= 4 << 20
    assert (1 << 20) - block < held["fixed@1"] <= 1 << 20


def test_the_first_on_a_gpu_leaves_the_others_their_weights_and_like_caches() -> None:
    """It took all that there was, and the second one was refused for want of a single block."""
    models = [
        spec("one"), spec("encoder", ENCODER), spec("fixed", kv_cache_bytes=1 << 20),
        spec("wide", dtype="float32"), spec("gone", Path("/nowhere")),
    ]  # fmt: skip
    free = 64 << 20
    first = Neighbours.of(models, 0).gpu_share(free)
    stories, encoder = num_values(STORIES), num_values(ENCODER)
    later = 2 * encoder + (2 * stories + (1 << 20)) + 4 * stories
    assert first == (free - later) // 2
    free -= first + later
    assert Neighbours.of(models, 3).gpu_share(free) == pytest.approx(first, abs=1)
    assert Neighbours.of(models, 0).gpu_share(1 << 20) == 0


async def test_what_each_checkpoint_holds_is_shown(make_engine: MakeEngine) -> None:
    engine = await make_engine(encoder=True)
    shown = {
        (entry.name, f"{entry.labels['model']}@{entry.labels['version']}"): entry.value
        for metric in engine._books.metrics.registry.collect()
        for entry in metric.samples
        if entry.name in ("slimpajama_weight_bytes", "slimpajama_kv_cache_bytes")
    }
    block = BLOCK_TOKENS * TOKEN_BYTES
    assert shown["slimpajama_weight_bytes", KEY] >= 4 * num_values(STORIES)
    assert (8 << 20) - block < shown["slimpajama_kv_cache_bytes", KEY] <= 8 << 20
    assert shown["slimpajama_weight_bytes", ENCODER_KEY] > num_values(ENCODER)
    assert shown["slimpajama_kv_cache_bytes", ENCODER_KEY] == 0
