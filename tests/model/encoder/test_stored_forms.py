"""Encoder checkpoints as they are found: old names, leftover buffers, with and without prefix; what they can do."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from model.description import describe
from model.encode_network import load_encode_network
from model.errors import CheckpointError

Run = Callable[..., list[NDArray[np.float32]]]
MakeModel = Callable[..., tuple[Path, PreTrainedModel]]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def tensorflow_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights.items()
    }


def with_buffers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"bert.embeddings.position_ids": torch.arange(80)[None]}


@pytest.mark.parametrize("change", [tensorflow_names, with_buffers])
def test_older_checkpoints_load_as_they_are(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, _ = make_model("bert", "ForSequenceClassification")
    before = run(folder, texts, "logits")
    rewrite(folder, change)
    for found, expected in zip(run(folder, texts, "logits"), before, strict=True):
        assert_allclose(found, expected)


def test_albert_without_an_activation_has_its_class_own(
    make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    """BERT's exact GELU stood in for the approximation that ALBERT was trained with."""
    folder, model = make_model("albert")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    assert raw.pop("hidden_act") == "gelu_new"
    path.write_text(json.dumps(raw))
    expected = model(torch.tensor([texts[1]])).last_hidden_state[0].detach().numpy()
    assert_allclose(run(folder, texts)[1], expected, atol=1e-5)


def test_bare_encoder_stored_under_its_prefix_loads(
    family: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model(family)
    before = run(folder, texts)
    prefix = model.base_model_prefix
    rewrite(folder, lambda weights: {f"{prefix}.{name}": tensor for name, tensor in weights.items()})
    for found, expected in zip(run(folder, texts), before, strict=True):
        assert_allclose(found, expected)


@pytest.mark.parametrize("name", ["classifier.weight", "bert.encoder.layer.1.attention.self.key.bias"])
def test_missing_tensor_is_named(name: str, make_model: MakeModel) -> None:
    folder, _ = make_model("bert", "ForSequenceClassification")
    rewrite(folder, lambda weights: {key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(CheckpointError, match=name):
        load_encode_network(folder)


def test_tensor_without_a_place_is_refused(make_model: MakeModel) -> None:
    folder, _ = make_model("bert", "ForSequenceClassification")
    rewrite(folder, lambda weights: weights | {"bert.adapter.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"bert\.adapter\.weight"):
        load_encode_network(folder)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("bert", "position_embedding_type", "relative_key"),
        ("roformer", "rotary_value", True),
        ("deberta", "talking_head", True),
        ("deberta", "position_buckets", 256),
    ],
)
def test_what_is_not_computed_is_refused_by_the_key(
    family: str, key: str, value: object, make_model: MakeModel
) -> None:
    folder, _ = make_model(family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=f"{key} {value!r}"):
        describe(folder)


@pytest.mark.parametrize(
    ("suffix", "changes", "head", "tasks"),
    [
        ("Model", {}, "embedding", {"embed", "similarity", "rerank"}),
        ("ForSequenceClassification", {"num_labels": 1}, "cross_encoder", {"rerank"}),
        ("ForSequenceClassification", {"num_labels": 3}, "sequence_classification", {"classify"}),
        (
            "ForSequenceClassification",
            {"id2label": {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}},
            "sequence_classification",
            {"classify", "zero_shot"},
        ),
        (
            "ForSequenceClassification",
            {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}},
            "sequence_classification",
            {"classify", "sentiment"},
        ),
        ("ForTokenClassification", {"num_labels": 4}, "token_classification", {"token_classify"}),
        ("ForQuestionAnswering", {}, "question_answering", {"answer"}),
    ],
)
def test_description_says_what_a_checkpoint_can_do(
    suffix: str,
    changes: dict[str, object],
    head: str,
    tasks: set[str],
    family: str,
    make_model: MakeModel,
) -> None:
    folder, model = make_model(family, suffix, **changes)
    description = describe(folder)
    assert description.network == "encoder"
    assert description.head == head
    assert tasks <= set(description.tasks)
    if "Classification" in suffix:
        assert description.labels == tuple(model.config.id2label.values())
    else:
        assert description.labels == ()


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_problem_type_is_reported(problem: str, make_model: MakeModel) -> None:
    folder, _ = make_model("distilbert", "ForSequenceClassification", num_labels=3, problem_type=problem)
    assert describe(folder).problem_type == problem


def test_lower_limit_keeps_the_whole_position_table(make_model: MakeModel) -> None:
    folder, _ = make_model("roberta")
    assert describe(folder, 20).context_length == 20
    assert load_encode_network(folder, max_model_len=20).config.context_length == 20
    assert describe(folder, 500).context_length == 78
