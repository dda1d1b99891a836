"""Names told by capitals: what counts as one, what is left out, and that the shipped head learnt them."""

import pytest

from model.training.export import load_encoder
from model.training.heads import load_head
from model.training.metrics import precision_recall_f1
from model.training.name_head import find_names, token_targets
from model.training.names import known_names, sentences_with_names, words_of
from model.training.tokenizers import load_tokenizer
from tests.model.training.test_checkpoints import ENCODER


@pytest.mark.parametrize(
    ("sentence", "names", "unsure"),
    [
        ("Then Mr. Darcy and I left Paris.", ["mr", "darcy", "paris"], ["then"]),
        ('"Come," said Anne; "You must."', ["anne"], ["come", "you"]),
        ("They saw, as Oh so often, VERY little of Jean-Paul.", ["jean", "paul"], ["they", "very"]),
    ],
)
def test_a_capital_inside_a_sentence_is_a_name_and_one_that_opens_it_says_nothing(sentence, names, unsure):
    words = words_of(sentence)
    assert [word.text for word in words if word.is_name] == names
    assert [word.text for word in words if word.is_name is None] == unsure
    assert [sentence[word.start : word.end].lower() for word in words] == [word.text for word in words]


def test_all_tokens_of_a_name_and_the_stop_of_its_title_are_learnt_as_one_and_special_tokens_not_at_all():
    sentence = "Then Mr. Darcy left."
    encoding = load_tokenizer(ENCODER, 256).encode(sentence)
    assert encoding.tokens == ["[CLS]", "then", "mr", ".", "dar", "##cy", "left", ".", "[SEP]"]
    assert token_targets(sentence, encoding) == [None, None, 1, 1, 1, 1, 0, 0, None]


def test_headings_and_fragments_are_no_sentences():
    lines = [
        "The Adventures Of Tom Sawyer And Others.",
        "and so they went home in the evening.",
        "So they met Tom at the mill at noon.",
    ]
    assert sentences_with_names(["\n".join(lines)], per_text=9, seed=0) == lines[2:]


def test_the_baseline_goes_by_what_a_word_was_more_often():
    known = known_names(["He saw Rose.", "She saw Rose.", "They saw a rose.", "She has no hope, and Hope has one."])
    assert (known["rose"], known["hope"], "they" in known) == (True, False, False)


def test_precision_recall_and_f1():
    assert precision_recall_f1([True, True, False, False], [True, False, True, True]) == {
        "precision": 0.5, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.4)
    }  # fmt: skip


@pytest.mark.parametrize("change", [str, str.lower])
def test_the_shipped_head_finds_names_with_and_without_capitals(change):
    sentences = [change("Then Elizabeth went to London with her sister."), change("The old man walked down the road.")]
    network, tokenizer = load_encoder(ENCODER), load_tokenizer(ENCODER, 256)
    found = find_names(network, tokenizer, load_head(ENCODER / "heads" / "names"), sentences)
    words = [words_of(sentence) for sentence in sentences]
    assert [
        [word.text for word, is_name in zip(row, names, strict=True) if is_name]
        for row, names in zip(words, found, strict=True)
    ] == [["elizabeth", "london"], []]
