"""SentencePiece models read by us cut and join texts as the sentencepiece library does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from model.errors import CheckpointError
from model.sentencepiece_reader import make_backend, read_sentencepiece

Train = Callable[..., Path]

CASES: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 700},
    "bpe": {"model_type": "bpe"},
    "bpe-bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700},
    "plain-text": {"normalization_rule_name": "identity"},
    "spaces-kept": {"remove_extra_whitespaces": False},
    "no-first-space": {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("case", CASES)
def test_texts_are_cut_and_joined_as_by_the_library(train: Train, texts: list[str], case: str) -> None:
    path = train(**CASES[case])
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_sentencepiece(path)
    assert [piece.text for piece in model.pieces] == [library.id_to_piece(i) for i in range(len(library))]
    backend = make_backend(model, model.vocabulary, unknown_id=model.unknown_id, special=["<s>", "</s>"])
    for text in texts:
        expected = library.encode(text)
        assert backend.encode(text).ids == expected, text
        # The library writes " ⁇ " for what is unknown.
        if library.unk_id() not in expected:
            assert backend.decode(expected) == library.decode(expected)


def test_symbols_of_the_models_maker_stay_whole(train: Train) -> None:
    path = train(model_type="bpe", user_defined_symbols=["<sep>"])
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_sentencepiece(path)
    backend = make_backend(model, model.vocabulary, unknown_id=0)
    assert library.piece_to_id("<sep>") in backend.encode("one<sep>two").ids


def test_what_follows_such_a_symbol_is_no_new_word(train: Train, texts: list[str]) -> None:
    """`half-dead` was cut as `half- dead` where the model's maker wants hyphens whole, as ALBERT's does."""
    path = train(user_defined_symbols=["<sep>", "-", "(", ")", ".", "–"])
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_sentencepiece(path)
    backend = make_backend(model, model.vocabulary, unknown_id=0)
    for text in [*texts, "one<sep>two", "half-dead -(x)–y) . 1.5"]:
        assert backend.encode(text).ids == library.encode(text), text


@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff", b"{}", b"\x0a\x05\x0a\x01a\x15\x00", bytes(40)])
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spiece\.model is not a SentencePiece model"):
        read_sentencepiece(path)


def test_a_model_cut_off_anywhere_is_refused(train: Train, tmp_path: Path) -> None:
    data = train().read_bytes()
    path = tmp_path / "spiece.model"
    for length in (1, 7, 100, 1001):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_sentencepiece(path)


def test_models_of_words_are_refused(train: Train) -> None:
    with pytest.raises(CheckpointError, match="words or characters"):
        read_sentencepiece(train(model_type="word", vocab_size=40))
