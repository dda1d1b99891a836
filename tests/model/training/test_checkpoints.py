"""The checkpoints that ship with the project: ordinary, small, and as good as their cards say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.training.cards import fill, render_card
from model.training.export import load_encoder, load_language_model
from model.training.heads import head_logits, load_head
from model.training.teacher import embed
from model.training.tokenizers import load_tokenizer

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
ENCODER, LANGUAGE_MODEL = CHECKPOINTS / "slimpajama-tiny-encoder", CHECKPOINTS / "slimpajama-tiny-lm"
TEXTS = ["A fox saw some grapes.", "Where is my new card?", "a gripping , funny film with a great cast ."]


def test_both_checkpoints_together_take_at_most_32_megabytes():
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()) <= 32 * 10**6


@pytest.mark.parametrize("folder", [ENCODER, LANGUAGE_MODEL], ids=lambda folder: folder.name)
def test_the_card_says_what_the_evaluation_measured(folder):
    assert (folder / "README.md").read_text() == render_card(folder)


def test_a_card_can_be_made_before_the_service_was_measured(tmp_path):
    folder = tmp_path / ENCODER.name
    folder.mkdir()
    report = json.loads((ENCODER / "evaluation.json").read_text())
    del report["through_the_service"]
    (folder / "evaluation.json").write_text(json.dumps(report))
    lines, whole = render_card(folder).splitlines(), (ENCODER / "README.md").read_text().splitlines()
    left_out = [line for line in whole if line not in lines]
    assert [line.split(" |")[0] for line in left_out] == [
        "| through the service (bfloat16): sentiment / intents / spam",
        "| — answers: EM / F1",
    ]
    assert [line for line in whole if line not in left_out] == lines


@pytest.mark.parametrize("folder", [ENCODER, LANGUAGE_MODEL], ids=lambda folder: folder.name)
def test_the_card_counts_the_parameters_that_are_stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert json.loads((folder / "evaluation.json").read_text())["sizes"]["parameters"] == stored


def test_a_card_cannot_be_filled_from_a_report_that_lacks_a_number():
    assert fill("{a.b:.2f} of {c:,}", {"a": {"b": 0.5}, "c": 1000}) == "0.50 of 1,000"
    with pytest.raises(KeyError):
        fill("{a.missing}", {"a": {}})


def test_sentence_transformers_reads_the_encoder_and_embeds_as_the_recipe_does():
    reference = SentenceTransformer(str(ENCODER), device="cpu")
    ours = embed(load_encoder(ENCODER), load_tokenizer(ENCODER, 256), TEXTS)
    np.testing.assert_allclose(reference.encode(TEXTS), ours, atol=1e-5)


def test_sentiment_and_spam_heads_tell_the_obvious_apart():
    network, tokenizer = load_encoder(ENCODER), load_tokenizer(ENCODER, 256)
    cases = {
        "sentiment": {"positive": TEXTS[2], "negative": "a dull , lifeless mess that wastes its actors ."},
        "spam": {"spam": "WINNER!! Call 09061701461 now to claim your £900 prize!", "ham": "ok see you at home at six"},
    }
    for name, examples in cases.items():
        head = load_head(ENCODER / "heads" / name)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(examples.values()))]
        predicted = head_logits(network, head, ids).argmax(1).tolist()
        assert [head.config.labels[index] for index in predicted] == list(examples)


@torch.inference_mode()
def test_transformers_reads_the_language_model_and_continues_as_the_recipe_does():
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    reference = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    network = load_language_model(LANGUAGE_MODEL)
    np.testing.assert_allclose(network.logits(network(ids)), reference(ids).logits, atol=1e-3, rtol=1e-4)
