"""A request that names no checkpoint gets, of the one that answers, the version that its caller always gets."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from model.description import CheckpointDescription
from model.task_heads import TaskHeadConfig
from service.engine.aliases import Alias, sticky_key_context
from service.engine.models import LoadedModel, ModelDirectory
from service.engine.protocol import ModelSpec
from service.tasks import answering, classification, sentiment, summarization, translation

CALLERS = [f"caller-{number}" for number in range(40)]
ALIAS = Alias({"1": 1.0, "2": 1.0, "3": 0.0})

TASKS = ("generate", "chat", "classify", "sentiment", "summarize", "translate", "answer", "embed", "tokenize")
KINDS: dict[str, dict[str, Any]] = {
    "writer": {"network": "decoder", "head": "language_model"},
    "reader": {"network": "encoder", "head": "question_answering"},
    "judge": {
        "network": "encoder",
        "head": "sequence_classification",
        "labels": ("negative", "positive"),
        "problem_type": "single_label_classification",
    },
    "embedder": {
        "network": "encoder",
        "head": "embedding",
        "heads": {"topic": TaskHeadConfig(folder=Path(), kind="classification", input="embedding", labels=("a", "b"))},
    },
}


def model(kind: str, version: str) -> LoadedModel:
    description = CheckpointDescription(
        folder=Path(kind), architecture="X", model_type="x", tasks=TASKS, context_length=64, vocab_size=9,
        version=version, **KINDS[kind],
    )  # fmt: skip
    return LoadedModel(
        name=kind, version=version, spec=ModelSpec(key=f"{kind}@{version}", folder=kind), description=description,
        tokenizer=cast(Any, None), chat_template=None, state="ready",
    )  # fmt: skip


@pytest.fixture
def make_engine() -> Callable[[str], Any]:
    """One name with two versions that share it and one that has no share."""

    def make(kind: str) -> Any:
        models = ModelDirectory()
        for version in ("1", "2", "3"):
            models.serve(model(kind, version))
        models.divide(kind, ALIAS)
        return SimpleNamespace(models=models, resolve=models.resolve)

    return make


@pytest.mark.parametrize(
    ("kind", "choose"),
    [
        ("writer", lambda engine: engine.resolve(None, "generate")),
        ("writer", lambda engine: classification.choose_for_labels(engine, None).model),
        ("judge", lambda engine: classification.choose_own(engine, None).model),
        ("embedder", lambda engine: classification.choose_head(engine, None, "topic").model),
        ("judge", lambda engine: sentiment.choose(engine, None).way.model),
        ("embedder", lambda engine: sentiment.choose(engine, None).way.model),
        ("writer", lambda engine: summarization.choose(engine, None, "auto")[0]),
        ("embedder", lambda engine: summarization.choose(engine, None, "extractive")[0]),
        ("writer", lambda engine: translation.choose(engine, None, None, "de").model),
        ("writer", lambda engine: answering.choose(engine, None, "auto", prefers="generative")[0]),
        ("reader", lambda engine: answering.choose(engine, None, "auto", prefers="generative")[0]),
    ],
    ids=[
        "generate", "labels", "own-labels", "head", "sentiment-trained", "sentiment-by-words", "summarize",
        "summarize-extractive", "translate", "answer", "answer-extractive",
    ],
)  # fmt: skip
def test_each_caller_gets_its_own_version_whether_or_not_it_names_the_checkpoint(
    make_engine: Callable[[str], Any], kind: str, choose: Callable[[Any], LoadedModel]
) -> None:
    engine, found = make_engine(kind), []
    for caller in CALLERS:
        token = sticky_key_context.set(caller)
        found.append(choose(engine).version)
        assert engine.resolve(kind, "classify").version == found[-1]
        sticky_key_context.reset(token)
    assert found == [ALIAS.pick(kind, caller) for caller in CALLERS]
    assert set(found) == {"1", "2"}


def test_a_version_without_a_share_is_offered_to_nobody_even_if_it_alone_could_do_the_task(
    make_engine: Callable[[str], Any],
) -> None:
    engine = make_engine("writer")
    assert {entry.version for entry in engine.models.offered()} <= {"1", "2"}
    assert len(engine.models.offered()) == 1
    assert engine.models.named("writer@3").version == "3"
