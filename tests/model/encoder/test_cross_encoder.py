"""Cross-encoders give the scores of `CrossEncoder.predict`, its activation included."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer import modules as st_modules
from transformers import BertTokenizerFast, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from model.description import describe
from model.encoder_runner import EncodeItem, EncoderRunner
from model.sentence_transformer import ACTIVATIONS

PAIRS = [("the cat", "sat on the mat"), ("good", "very bad film and the dog ran to the far hill"), ("was", "not")]

MakeModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeRunner = Callable[[Path], EncoderRunner]


def scores(make_runner: MakeRunner, tokenizer: BertTokenizerFast, folder: Path) -> NDArray[np.float32]:
    encoded = [tokenizer(*pair) for pair in PAIRS]
    results = make_runner(folder).run(
        [EncodeItem(ids=each["input_ids"], type_ids=each["token_type_ids"], output="logits") for each in encoded]
    )
    logits = np.stack([result for result in results if isinstance(result, np.ndarray)])
    description = describe(folder)
    assert description.head == "cross_encoder"
    assert description.score_activation is not None
    return ACTIVATIONS[description.score_activation](torch.from_numpy(logits)).numpy()[:, 0]


@pytest.fixture
def reranker(make_model: MakeModel, tokenizer: BertTokenizerFast) -> Path:
    folder, _ = make_model("bert", "ForSequenceClassification", num_labels=1)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "electra", "eurobert", "gte"])
def test_one_label_gets_a_sigmoid_by_default(
    family: str, make_model: MakeModel, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    folder, _ = make_model(family, "ForSequenceClassification", num_labels=1)
    tokenizer.save_pretrained(folder)
    theirs = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    ours = scores(make_runner, tokenizer, folder)
    assert_allclose(ours, theirs, atol=1e-5)
    assert describe(folder).tasks[0] == "rerank"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sbert_ce_default_activation_function", "torch.nn.modules.linear.Identity"),
        ("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}),
        ("sentence_transformers", {"activation_fn": "torch.nn.modules.activation.Tanh", "version": "4.1.0"}),
    ],
)
def test_stored_activation_goes_before_the_default(
    key: str, value: object, reranker: Path, make_runner: MakeRunner, tokenizer: BertTokenizerFast
) -> None:
    path = reranker / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    theirs = CrossEncoder(str(reranker), device="cpu").predict(PAIRS)
    assert_allclose(scores(make_runner, tokenizer, reranker), theirs, atol=1e-5)


def test_folder_saved_by_cross_encoder_keeps_its_activation(
    reranker: Path, make_runner: MakeRunner, tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    model = CrossEncoder(str(reranker), device="cpu", activation_fn=torch.nn.Identity())
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert_allclose(scores(make_runner, tokenizer, tmp_path / "saved"), model.predict(PAIRS), atol=1e-5)


def test_dense_scorer_over_a_pooled_encoder(
    make_model: MakeModel, make_runner: MakeRunner, tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    folder, _ = make_model("bert")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    dense = st_modules.Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    parts = [st_modules.Transformer(str(folder)), st_modules.Pooling(32, pooling_mode="cls"), dense]
    model = CrossEncoder(modules=parts, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert_allclose(scores(make_runner, tokenizer, tmp_path / "saved"), model.predict(PAIRS), atol=1e-5)


@pytest.mark.parametrize("false_id", [7, None])
def test_decoder_reranker_scores_by_the_logits_of_its_answers(
    false_id: int | None,
    save_model: Callable[[PreTrainedModel], Path],
    make_runner: MakeRunner,
    tokenizer: BertTokenizerFast,
    tmp_path: Path,
) -> None:
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
    folder = save_model(LlamaForCausalLM(config))
    tokenizer.save_pretrained(folder)
    transformer = st_modules.Transformer(str(folder), transformer_task="text-generation")
    model = CrossEncoder(modules=[transformer, LogitScore(true_token_id=6, false_token_id=false_id)], device="cpu")
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert_allclose(scores(make_runner, tokenizer, tmp_path / "saved"), model.predict(PAIRS), atol=1e-5)
