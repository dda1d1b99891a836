"""Tokenizers of encoders without tokenizer.json: ids, types and offsets are transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

from model.tokenizer import Tokenizer

MakeFolder = Callable[..., Path]

ALBERT = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}
DEBERTA = {
    **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    **{"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
}
# transformers leaves out DeBERTa's map of characters; this model has none.
UNMAPPED = {**DEBERTA, "normalization_rule_name": "identity"}
SPACED_MASK = {"__type": "AddedToken", "content": "[MASK]", "lstrip": True, "special": True}
HARD = [
    "In 1912, 1,000,000 of 9,5; 3,",
    "``quoted'' and ''so''",
    "ÇÀ ET LÀ, Ünïcödé ŁÓDŹ ẞ İstanbul",
    "A\u0302\u0300 e\u0301te\u0300 \u0301alone",
    "👩\u200d👩\u200d👧 🇫🇷 \u200b\u3000\u2028x",
    "a [MASK] b <mask> c",
    " <mask>[MASK] [CLS]x</s> <s>NOTUSED <unk>",
]
CASES: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
    ("albert", "spiece.model", ALBERT, "AlbertTokenizer", {}),
    ("albert", "spiece.model", ALBERT, "AlbertTokenizer", {"do_lower_case": False}),
    ("albert", "spiece.model", ALBERT, "AlbertTokenizer", {"keep_accents": True}),
    ("deberta-v2", "spm.model", UNMAPPED, "DebertaV2Tokenizer", {}),
    ("deberta-v2", "spm.model", UNMAPPED, "DebertaV2Tokenizer", {"do_lower_case": True}),
    ("deberta-v2", "spm.model", UNMAPPED, "DebertaV2Tokenizer", {"split_by_punct": True, "mask_token": SPACED_MASK}),
    ("camembert", "sentencepiece.bpe.model", {}, "CamembertTokenizer", {}),
    ("xlm-roberta", "sentencepiece.bpe.model", {}, "XLMRobertaTokenizer", {}),
]


@pytest.mark.parametrize(("kind", "file", "training", "reference", "config"), CASES)
def test_ids_types_and_offsets_are_those_of_transformers(
    make_folder: MakeFolder,
    texts: list[str],
    kind: str,
    file: str,
    training: dict[str, Any],
    reference: str,
    config: dict[str, Any],
) -> None:
    """ALBERT, DeBERTa and CamemBERT without a tokenizer.json were refused."""
    folder = make_folder(kind, file, training, **config)
    theirs = getattr(transformers, reference).from_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    single = [*texts, *HARD]
    asked = [*single, *(pair for pair in zip(single, reversed(single), strict=True) if pair[1])]
    for ours, text in zip(tokenizer.encode_batch(asked), asked, strict=True):
        both = text if isinstance(text, tuple) else (text,)
        found = theirs(*both, return_offsets_mapping=True, return_token_type_ids=True)
        assert ours.ids == found["input_ids"], text
        assert ours.type_ids == found["token_type_ids"], text
        assert ours.offsets == found["offset_mapping"], text
        assert tokenizer.decode(ours.ids) == theirs.decode(ours.ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(theirs)


def test_deberta_maps_characters_as_it_was_trained(make_folder: MakeFolder, texts: list[str]) -> None:
    """transformers 5 leaves the model's map out: a non-breaking space or a wide letter would be unknown."""
    folder = make_folder("deberta-v2", "spm.model", DEBERTA)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    tokenizer = Tokenizer.load(folder)
    for text in [*texts, *HARD[:4]]:
        if "▁" not in text:  # the library takes it for a space that may be dropped
            assert tokenizer.encode(text) == [1, *library.encode(text), 2], text


def test_symbols_that_alberts_maker_wants_whole_start_no_word(make_folder: MakeFolder, texts: list[str]) -> None:
    """transformers 5 would cut `half-dead` as `half- dead`, and so with each of these eight, from this file alone."""
    folder = make_folder(
        "albert",
        "spiece.model",
        {**ALBERT, "user_defined_symbols": [*'()"-.–£€']},
        do_lower_case=False,
        keep_accents=True,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = Tokenizer.load(folder)
    for text in [*texts, "half-dead (x)–y) . 1.5 £3"]:
        assert tokenizer.encode(text) == [2, *library.encode(text), 3], text
