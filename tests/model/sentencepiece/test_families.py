"""Tokenizers of folders without tokenizer.json: ids of every family as its own slow tokenizer gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import M2M100Tokenizer, MarianTokenizer

from model.errors import CheckpointError
from model.tokenizer import Tokenizer

Train = Callable[..., Path]
T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def library(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def load(folder: Path, model_type: str, **config: Any) -> Tokenizer:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_t5_numbers_as_the_model_and_puts_its_sentinels_behind(train: Train, tmp_path: Path, texts: list[str]) -> None:
    reference = library(train(**T5_IDS))
    tokenizer = load(tmp_path, "t5", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    for text in texts:
        assert tokenizer.encode(text) == [*reference.encode(text), 1]
    size = len(reference)
    assert tokenizer.vocab_size == size + 100
    assert (tokenizer.token_id("<extra_id_0>"), tokenizer.token_id("<extra_id_99>")) == (size + 99, size)
    assert tokenizer.decode([*reference.encode(texts[0]), 1, 0]) == texts[0]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 0)


def test_mt5_has_the_sentinels_that_its_config_says(train: Train, tmp_path: Path) -> None:
    size = len(library(train(**T5_IDS)))
    assert load(tmp_path, "mt5", extra_ids=0).vocab_size == size


def test_pegasus_pieces_come_behind_its_hundred_and_three(train: Train, tmp_path: Path, texts: list[str]) -> None:
    reference = library(train(**T5_IDS))
    tokenizer = load(tmp_path, "pegasus")
    for text in texts:
        assert tokenizer.encode(text) == [*(id_ + 103 for id_ in reference.encode(text)), 1]
    assert [tokenizer.token(id_) for id_ in (0, 1, 2, 3, 4, 104)] == (
        ["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>", "<unk_102>"]
    )


@pytest.mark.parametrize(
    ("model_type", "config", "before", "after"),
    [
        ("xlm-roberta", {}, ["<s>"], ["</s>"]),
        ("mbart", {"tokenizer_class": "MBartTokenizer", "src_lang": "de_DE"}, [], ["</s>", "de_DE"]),
        ("mbart", {"tokenizer_class": "MBart50Tokenizer"}, ["en_XX"], ["</s>"]),
        ("m2m_100", {"additional_special_tokens": ["deu_Latn", "eng_Latn"]}, ["eng_Latn"], ["</s>"]),
        (
            "m2m_100",
            {"additional_special_tokens": ["deu_Latn", "eng_Latn"], "legacy_behaviour": True, "src_lang": "deu_Latn"},
            [],
            ["</s>", "deu_Latn"],
        ),
    ],
    ids=["xlm-roberta", "mbart-25", "mbart-50", "nllb", "nllb-legacy"],
)
def test_fairseqs_four_tokens_shift_the_others_by_one(
    train: Train,
    tmp_path: Path,
    texts: list[str],
    model_type: str,
    config: dict[str, Any],
    before: list[str],
    after: list[str],
) -> None:
    reference = library(train("sentencepiece.bpe.model"))
    tokenizer = load(tmp_path, model_type, **config)
    for text in texts:
        # fairseq's <unk> is 3, where the model's own is 0.
        expected = [id_ + 1 if id_ > 0 else 3 for id_ in reference.encode(text)]
        around = [[tokenizer.token_id(token) for token in tokens] for tokens in (before, after)]
        assert tokenizer.encode(text) == around[0] + expected + around[1]
    assert [tokenizer.token(id_) for id_ in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    first_code = {"mbart": "ar_AR", "m2m_100": "deu_Latn"}.get(model_type, "<mask>")
    assert tokenizer.token_id(first_code) == len(reference) + 1


def test_m2m100_is_numbered_by_its_vocabulary(train: Train, tmp_path: Path, texts: list[str]) -> None:
    path = train("sentencepiece.bpe.model")
    pieces = library(path)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(id_) for id_ in reversed(range(3, len(pieces))))]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    reference = M2M100Tokenizer(str(tmp_path / "vocab.json"), str(path), src_lang="fr")
    tokenizer = load(tmp_path, "m2m_100", src_lang="fr", tokenizer_class="M2M100Tokenizer")
    for text in texts:
        assert tokenizer.encode(text) == reference(text).input_ids
    ids = reference("The lion and the mouse.").input_ids
    assert tokenizer.decode(ids) == reference.decode(ids[1:], skip_special_tokens=True) == "The lion and the mouse."
    assert tokenizer.token_id("__zu__") == reference.get_lang_id("zu")


@pytest.fixture
def marian(train: Train, tmp_path: Path) -> tuple[Tokenizer, MarianTokenizer]:
    """Source and target have models of their own, and one vocabulary for both, with target-language tokens."""
    files = [str(train("source.spm", vocab_size=250)), str(train("target.spm", vocab_size=330))]
    found = [library(Path(file)) for file in files]
    pieces = dict.fromkeys(model.id_to_piece(id_) for model in found for id_ in range(3, len(model)))
    tokens = ["</s>", "<unk>", *sorted(pieces), ">>fra<<", ">>deu<<", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    with pytest.warns(UserWarning, match="sacremoses"):
        reference = MarianTokenizer(*files, str(tmp_path / "vocab.json"), source_lang="en", target_lang="fra")
    tokenizer = load(tmp_path, "marian", source_lang="en", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return tokenizer, reference


def test_marian_cuts_by_the_source_and_numbers_by_its_vocabulary(
    marian: tuple[Tokenizer, MarianTokenizer], texts: list[str]
) -> None:
    tokenizer, reference = marian
    for text in [*texts, ">>fra<< The lion and the mouse.", ">>deu<<The old man", "\ue000the"]:
        assert tokenizer.encode(text) == reference(text).input_ids, text


def test_marian_writes_pieces_of_the_target_alone(
    marian: tuple[Tokenizer, MarianTokenizer], texts: list[str], tmp_path: Path
) -> None:
    tokenizer, reference = marian
    target, source = library(tmp_path / "target.spm"), library(tmp_path / "source.spm")
    met = 0
    for text in texts:
        pieces = target.encode(text, out_type=str)
        met += sum(source.piece_to_id(piece) == source.unk_id() for piece in pieces)
        ids = [reference.convert_tokens_to_ids(piece) for piece in pieces]
        if reference.unk_token_id not in ids:
            assert tokenizer.decode([*ids, 0]) == reference.decode([*ids, 0], skip_special_tokens=True)
            stream = tokenizer.detokenizer()
            assert "".join([*(stream.push([id_]) for id_ in ids), stream.flush()]) == tokenizer.decode(ids)
    assert met > 5


def test_a_folder_with_neither_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load(tmp_path, "t5")


def test_a_vocabulary_with_holes_is_refused(train: Train, tmp_path: Path) -> None:
    train("source.spm")
    (tmp_path / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 1, "a": 5}))
    with pytest.raises(CheckpointError, match="numbers from 0 to 2"):
        load(tmp_path, "marian")
