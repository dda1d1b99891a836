"""Tokenizers of language models that have a tokenizer.model alone: ids and offsets are transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

from model.errors import CheckpointError
from model.tokenizer import Tokenizer

MakeFolder = Callable[..., Path]

LLAMA: dict[str, Any] = {
    **{"model_type": "bpe", "byte_fallback": True, "vocab_size": 700},
    **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}
GEMMA: dict[str, Any] = {
    **{**LLAMA, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
    "user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>"],
}
BOTH = {"add_bos_token": True, "add_eos_token": True}
HARD = [
    "<s>[INST] hi [/INST] x</s><s> y",
    "a</s>b</s> c",
    "<bos><start_of_turn>user\nhi<end_of_turn>",
    "👩\u200d👧\u3000x",
]


@pytest.mark.parametrize(
    ("kind", "reference", "training", "config"),
    [
        ("llama", "LlamaTokenizer", LLAMA, {"add_bos_token": True}),
        ("llama", "LlamaTokenizer", LLAMA, {**BOTH, "legacy": True}),
        ("llama", "LlamaTokenizer", LLAMA, {"add_bos_token": False, "add_prefix_space": False}),
        ("mistral", "LlamaTokenizer", LLAMA, {**BOTH, "add_prefix_space": None}),
        ("gemma2", "GemmaTokenizer", GEMMA, BOTH),
        ("gemma3_text", "GemmaTokenizer", GEMMA, {"add_bos_token": True}),
    ],
)
def test_ids_and_offsets_are_those_of_transformers(
    make_folder: MakeFolder,
    texts: list[str],
    kind: str,
    reference: str,
    training: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """A tokenizer.model without a tokenizer.json was refused."""
    folder = make_folder(kind, "tokenizer.model", training, **config)
    theirs = getattr(transformers, reference).from_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    for text in [*texts, *HARD]:
        found, ours = theirs(text, return_offsets_mapping=True), tokenizer.encode_with_offsets(text)
        assert ours.ids == found["input_ids"], text
        assert ours.offsets == found["offset_mapping"], text
        assert tokenizer.decode(ours.ids) == theirs.decode(ours.ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_text_starts_with_a_token_where_no_config_says_otherwise(make_folder: MakeFolder, kind: str) -> None:
    folder = make_folder(kind, "tokenizer.model", GEMMA if kind == "gemma2" else LLAMA)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert Tokenizer.load(folder).encode("The lion") == [library.bos_id(), *library.encode("The lion")]


def test_what_the_config_lists_is_special(make_folder: MakeFolder) -> None:
    """Gemma's model has the ends of turns as ordinary pieces."""
    turns = {"additional_special_tokens": ["<start_of_turn>", {"content": "<end_of_turn>"}]}
    tokenizer = Tokenizer.load(make_folder("gemma2", "tokenizer.model", GEMMA, **turns))
    assert tokenizer.decode(tokenizer.encode("<start_of_turn>hi<end_of_turn>")) == "hi"


def test_a_start_that_the_model_does_not_have_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", "tokenizer.model", LLAMA, bos_token="<|start|>")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model has no '<\|start\|>'"):
        Tokenizer.load(folder)
