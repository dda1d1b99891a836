"""Tokenizers of folders with a plain vocabulary and no tokenizer.json: ids, types and offsets are transformers' own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

from model.errors import CheckpointError
from model.plain_vocabularies import BYTE_LEVEL
from model.tokenizer import Tokenizer

SENTENCES = [
    "The lion and the mouse lived in the forest by the river, and the mouse was small.",
    '"What a pity," said the fox, "that so fine a bird should have no voice!"',
    "In 1912, 42% of the 1,000 houses were built of stone & wood; the rest were not.",
    "Le lion et la souris vivaient dans la forêt, où l'eau était fraîche.",
    "狮子和老鼠住在河边的森林里",
]
TRICKY = ["", " ", "  two  spaces ", "e\u0301te\u0300 ﬁ \u00a0x", "emoji 😀😀", "a\tb\nc", "x" * 120, "it's don't"]
TEXTS = [*SENTENCES, *TRICKY]
MASKS = {
    "bert": "a [MASK] b",
    "distilbert": "[CLS]",
    "mpnet": "a <mask> b",
    "roberta": "a <mask> b",
    "bart": "<s>",
    "opt": "a </s> b<pad>",
}
LIKE_GPT2 = ("gpt2", "gpt_neo", "gptj", "codegen")
OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
SPACED_MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "special": True}


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(model_type, **tokenizer_config): config, vocabulary and nothing else that tells of the tokenizer."""

    def make(kind: str, **config: Any) -> Path:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        if kind in BYTE_LEVEL:
            trained = ByteLevelBPETokenizer()
            special = ["<|endoftext|>"] if kind in LIKE_GPT2 else special
            trained.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=special, show_progress=False)
        else:
            trained = BertWordPieceTokenizer(lowercase=config.get("do_lower_case", True))
            special = [*special, "[UNK]"] if kind == "mpnet" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            trained.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=special, show_progress=False)
        trained.save_model(str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("kind", "reference", "config"),
    [
        ("bert", "BertTokenizer", {}),
        ("bert", "BertTokenizer", {"do_lower_case": False}),
        ("bert", "BertTokenizer", {"strip_accents": False, "tokenize_chinese_chars": False}),
        ("distilbert", "DistilBertTokenizer", {"do_lower_case": True}),
        ("electra", "ElectraTokenizer", {}),
        ("ernie", "BertTokenizer", {}),
        ("megatron-bert", "BertTokenizer", {"do_lower_case": False}),
        ("nomic_bert", "BertTokenizer", {}),
        ("mpnet", "MPNetTokenizer", {}),
        ("roberta", "RobertaTokenizer", {}),
        ("roberta", "RobertaTokenizer", {"add_prefix_space": True}),
        ("roberta", "RobertaTokenizer", {"mask_token": SPACED_MASK}),
        ("data2vec-text", "RobertaTokenizer", {}),
        ("roberta-prelayernorm", "RobertaTokenizer", {}),
        ("bart", "BartTokenizer", {}),
        *((kind, "CodeGenTokenizer" if kind == "codegen" else "GPT2Tokenizer", {}) for kind in LIKE_GPT2),
        ("gpt2", "GPT2Tokenizer", {"add_bos_token": True}),
        ("opt", "GPT2Tokenizer", {"add_bos_token": True, **OPT}),
        ("opt", "GPT2Tokenizer", OPT),
    ],
)
def test_ids_types_and_offsets_are_those_of_transformers(
    make_folder: Callable[..., Path], kind: str, reference: str, config: dict[str, Any]
) -> None:
    """Such folders were refused for want of a tokenizer.json."""
    folder = make_folder(kind, **config)
    theirs = getattr(transformers, reference).from_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    texts = [*TEXTS, MASKS.get(kind, "<|endoftext|>")]
    pairs = [(one, other) for one, other in zip(TEXTS, SENTENCES, strict=False)]
    for ours, text in zip(tokenizer.encode_batch([*texts, *pairs]), [*texts, *pairs], strict=True):
        both = text if isinstance(text, tuple) else (text,)
        found = theirs(*both, return_offsets_mapping=True, return_token_type_ids=True)
        assert ours.ids == found["input_ids"], text
        assert ours.type_ids == found["token_type_ids"], text
        assert ours.offsets == found["offset_mapping"], text
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("kind", "file", "content", "advice"),
    [
        ("opt", "tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<bos>"}', "has no '<bos>'"),
        ("bert", "vocab.txt", "[PAD]\na\nb\n", "has no '[CLS]'"),
        ("roberta", "vocab.json", '{"a": 0}', "vocab.json"),
        ("roberta", "merges.txt", "x y z w\n", "merges.txt"),
    ],
)
def test_a_broken_vocabulary_is_named(
    make_folder: Callable[..., Path], kind: str, file: str, content: str, advice: str
) -> None:
    folder = make_folder(kind)
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=advice.replace("[", r"\[")):
        Tokenizer.load(folder)
