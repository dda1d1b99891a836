"""The heads give the logits that transformers gives, for every family, whatever mixture of texts shares the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from transformers import PreTrainedModel

Run = Callable[..., list[NDArray[np.float32]]]
MakeModel = Callable[..., tuple[Path, PreTrainedModel]]


def outputs(model: PreTrainedModel, ids: list[int]) -> Any:
    """What transformers makes of a text alone."""
    with torch.no_grad():
        return model(torch.tensor([ids]))


@pytest.mark.parametrize("num_labels", [1, 3])
def test_sequence_logits_are_those_of_transformers(
    num_labels: int, family: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model(family, "ForSequenceClassification", num_labels=num_labels)
    for ids, found in zip(texts, run(folder, texts, "logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)


def test_token_logits_are_those_of_transformers(
    family: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model(family, "ForTokenClassification", num_labels=5)
    for ids, found in zip(texts, run(folder, texts, "token_logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)


def test_span_logits_are_start_and_end_of_transformers(
    family: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model(family, "ForQuestionAnswering")
    for ids, found in zip(texts, run(folder, texts, "span_logits"), strict=True):
        expected = outputs(model, ids)
        assert_allclose(found[:, 0], expected.start_logits[0], atol=1e-4)
        assert_allclose(found[:, 1], expected.end_logits[0], atol=1e-4)


@pytest.mark.parametrize("changes", [{"classifier_pooling": "mean"}, {"classifier_bias": True, "norm_bias": True}])
def test_modernbert_head_follows_its_config(
    changes: dict[str, Any], make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model("modernbert", "ForSequenceClassification", classifier_activation="silu", **changes)
    for ids, found in zip(texts, run(folder, texts, "logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)


@pytest.mark.parametrize("key", ["classifier_pooling", "clf_pooling"])
@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_eurobert_head_pools_as_its_config_says(
    pooling: str, key: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    """By transformers' key, or by the one that the authors' code wrote before."""
    folder, model = make_model("eurobert", "ForSequenceClassification", classifier_pooling=pooling)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"classifier_pooling"', f'"{key}"'))
    for ids, found in zip(texts, run(folder, texts, "logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_deberta_pooler_follows_its_config(
    activation: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model("deberta-v2", "ForSequenceClassification", pooler_hidden_act=activation)
    for ids, found in zip(texts, run(folder, texts, "logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)


@pytest.mark.parametrize("suffix", ["ForMaskedLM", "ForPreTraining"])
def test_checkpoint_of_pre_training_serves_as_bare_encoder(
    suffix: str, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    folder, model = make_model("bert", suffix)
    for ids, found in zip(texts, run(folder, texts), strict=True):
        assert_allclose(found, outputs(model.bert, ids).last_hidden_state[0], atol=1e-4)


@pytest.mark.parametrize(
    ("family", "key"), [("electra", None), ("roformer", "hidden_act"), ("deberta", "pooler_hidden_act")]
)
def test_the_activation_of_a_classifier_is_its_familys(
    family: str, key: str | None, make_model: MakeModel, run: Run, texts: list[list[int]]
) -> None:
    """ELECTRA's is GELU, whatever its layers'."""
    folder, model = make_model(family, "ForSequenceClassification", **{key or "hidden_act": "relu"})
    for ids, found in zip(texts, run(folder, texts, "logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)


DECODERS = ["Llama", "Qwen3", "Mistral", "GPT2", "GPTNeoX", "Qwen3Moe", "Mixtral"]
SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("prefix", DECODERS)
def test_decoder_classifier_reads_the_last_token(
    prefix: str, save_model: Callable[..., Path], run: Run, texts: list[list[int]]
) -> None:
    sizes = {"num_labels": 3, "num_key_value_heads": 4, **SIZES} if prefix in ("GPT2", "GPTNeoX") else SIZES
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, "num_labels": 3})
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval()
    folder = save_model(model)
    for ids, found in zip(texts, run(folder, texts, "logits"), strict=True):
        assert_allclose(found, outputs(model, ids).logits[0], atol=1e-4)
