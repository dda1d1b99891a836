"""An engine whose worker is scripted: versions of a model `m` that load at once and say which one they are."""

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from service.admission import QueueLimits
from service.engine.accounting import Accounting
from service.engine.client import EngineClient
from service.engine.deployment import Deployment
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import ModelSpec, WorkerConfig
from service.engine.supervisor import SupervisorLimits
from service.metrics import Metrics

SCRIPTED_WORKER = Path(__file__).parent / "scripted_worker.py"
SLEEPY_WORKER = Path(__file__).parent / "sleepy_worker.py"
NAME = "m"


class StubTokenizer:
    """What a self-test and a shadow ask of a tokenizer."""

    backend = SimpleNamespace(get_vocab=lambda with_added_tokens: {"a": 1})

    def encode_batch(self, texts: list[str]) -> list[Any]:
        return [SimpleNamespace(ids=[1, 2]) for _ in texts]


def stub_model(
    name: str, folder: Path, version: str, *, head: str = "language_model", base: LoadedModel | None = None
) -> LoadedModel:
    description = SimpleNamespace(
        folder=folder, head=head, network="decoder", architecture="Scripted", decoder_start_id=None,
        version=folder.name,
        tasks=("generate",) if head == "language_model" else ("embed",),
    )  # fmt: skip
    return LoadedModel(
        name=name,
        version=version,
        spec=ModelSpec(key=f"{name}@{version}", folder=str(folder), shares=None if base is None else base.key),
        description=cast(Any, description),
        tokenizer=cast(Any, StubTokenizer()),
        chat_template=None,
        base=base,
    )


def write_checkpoint(parent: Path, token: int, **files: str) -> Path:
    """A folder as the scripted worker reads it; `golden` is its golden.json."""
    folder = parent / f"checkpoint-{token}"
    folder.mkdir()
    for name, text in ({"token": str(token), "journal": ""} | files).items():
        (folder / (name if name != "golden" else "golden.json")).write_text(text)
    return folder


def journal(folder: Path) -> list[str]:
    return (folder / "journal").read_text().split()


@asynccontextmanager
async def scripted_engine(first: Path, *, head: str = "language_model", **limits: Any) -> AsyncIterator[EngineClient]:
    """Ready, with `first` as `m@1`; what is deployed later says its own version. Adapters' base is `m`."""

    def prepare(name: str, deployment: Deployment, served: ModelDirectory) -> LoadedModel:
        base = served[NAME] if deployment.adapter else None
        return stub_model(name, Path(deployment.source), deployment.version or "x", head=head, base=base)

    engine = EngineClient(
        lambda: ModelDirectory({NAME: stub_model(NAME, first, "1", head=head)}),
        WorkerConfig(models=[]),
        SupervisorLimits(
            **{
                "restart_budget": 20,
                "max_backoff_seconds": 0.05,
                "command": (sys.executable, str(SCRIPTED_WORKER)),
                **limits,
            }
        ),
        accounting=Accounting(Metrics(), QueueLimits(1000, 10_000_000), time.monotonic()),
        prepare=prepare,
    )
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.stop()
