"""BART with a classification head, through the single-pass runner, as `transformers` has it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend
from model.attention.reference import ReferenceAttention
from model.description import describe
from model.encode_network import load_encode_network
from model.encoder_runner import EncodeItem, EncoderRunner

EOS = 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BartForSequenceClassification]:
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=90,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        id2label={0: "contradiction", 1: "neutral", 2: "entailment"},
    )
    model = BartForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
    folder = tmp_path_factory.mktemp("bart-classifier")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("backend", [ReferenceAttention(), CpuAttention()])
def test_logits_of_a_mixed_batch_are_those_of_each_text_alone(
    saved: tuple[Path, BartForSequenceClassification], backend: AttentionBackend
) -> None:
    folder, reference = saved
    generator = torch.Generator().manual_seed(3)
    texts = [[0, *torch.randint(4, 90, (size,), generator=generator).tolist(), EOS] for size in (3, 40, 1, 17, 17)]
    runner = EncoderRunner(load_encode_network(folder), backend)
    found = runner.run([EncodeItem(ids=text, output="logits") for text in texts])
    for text, logits in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([text])).logits[0].numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_the_weights_of_both_networks_are_counted(saved: tuple[Path, BartForSequenceClassification]) -> None:
    folder, reference = saved
    layers = [value for name, value in reference.named_parameters() if ".layers." in name and value.ndim == 2]
    assert load_encode_network(folder).num_layer_weights == sum(value.numel() for value in layers)


def test_it_is_described_as_a_classifier_that_does_zero_shot(saved: tuple[Path, BartForSequenceClassification]) -> None:
    found = describe(saved[0])
    assert found.head == "sequence_classification"
    assert found.labels == ("contradiction", "neutral", "entailment")
    assert "zero_shot" in found.tasks
    assert found.sequence_to_sequence is None
