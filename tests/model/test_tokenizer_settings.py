"""What the files beside a tokenizer.json change in it, and those that stand in for one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from model.errors import CheckpointError
from model.tokenizer import Tokenizer as OurTokenizer

SENTENCES = ["The lion and the Mouse lived by the river", "la forêt était fraîche", "狮子和老鼠住在河边"]
TEXTS = ["The Lion", "Forêt, é", "狮子和 x", "", " two  spaces"]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(model_type, backend, **tokenizer_config): a folder with a tokenizer.json, or with vocabulary files alone."""

    def write(kind: str, backend: Tokenizer, *, plain: bool = False, **config: Any) -> Path:
        if plain:
            backend.save_model(str(tmp_path))
        else:
            backend.save(str(tmp_path / "tokenizer.json"))
        for name, values in (("config.json", {"model_type": kind}), ("tokenizer_config.json", config)):
            (tmp_path / name).write_text(json.dumps(values))
        return tmp_path

    return write


def words(post_processor: Any = None) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", "the", "lion", "and"]
    backend = Tokenizer(models.WordLevel({piece: id for id, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    if post_processor is not None:
        backend.post_processor = post_processor
    return backend


def word_pieces() -> BertWordPieceTokenizer:
    trained = BertWordPieceTokenizer(lowercase=False)
    trained.train_from_iterator(SENTENCES, vocab_size=300, show_progress=False)
    trained._tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return trained


def byte_pieces(*, spaced: bool) -> ByteLevelBPETokenizer:
    trained = ByteLevelBPETokenizer(add_prefix_space=spaced)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    trained.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=special, show_progress=False)
    return trained


@pytest.mark.parametrize(
    "config",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        {"do_lower_case": False, "strip_accents": True},
        {},
    ],
)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "mpnet"])
def test_case_and_accents_are_what_the_config_says(make: Make, kind: str, config: dict[str, Any]) -> None:
    named = {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer", "mpnet": "MPNetTokenizer"}[kind]
    special = {} if kind != "mpnet" else {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    folder = make(kind, word_pieces(), tokenizer_class=named, **config, **special)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = OurTokenizer.load(folder)
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("config", [{"add_prefix_space": True}, {"add_prefix_space": False}, {}])
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_a_space_is_put_first_where_the_config_says_so(
    make: Make, kind: str, config: dict[str, Any], spaced: bool
) -> None:
    named = {"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer"}[kind]
    folder = make(kind, byte_pieces(spaced=spaced), tokenizer_class=named, **config)
    theirs, ours = AutoTokenizer.from_pretrained(folder), OurTokenizer.load(folder)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == expected


OPENED = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
MARKS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("kind", "config", "stored", "expected"),
    [
        ("mistral", {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, OPENED, [1, 3, 4, 2]),
        ("qwen2", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, None, [1, 3, 4]),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, OPENED, [3, 4]),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, OPENED, [1, 3, 4]),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, None, [3, 4]),
        ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True}, OPENED, [1, 3, 4]),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True}, None, [3, 4]),
        (
            "qwen2",
            {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True, "auto_map": {"AutoTokenizer": ["a.B", "a.C"]}},
            None,
            [3, 4, 2],
        ),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": None}, OPENED, [1, 3, 4]),
    ],
)
def test_what_is_put_around_a_text_is_as_it_was_in_training(
    make: Make, kind: str, config: dict[str, Any], stored: Any, expected: list[int]
) -> None:
    """As transformers 4 made it: e5-mistral-7b-instruct got no `</s>`, DeepSeek-R1-Distill-Qwen no start."""
    tokenizer = OurTokenizer.load(make(kind, words(stored), **{**MARKS, **config}))
    assert tokenizer.encode("the lion") == expected


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "'tokenizer_class' is 'BertJapaneseTokenizer'"),
        ({"word_tokenizer_type": "mecab"}, "'word_tokenizer_type' is 'mecab'"),
    ],
)
def test_a_vocabulary_for_another_tokenizer_is_refused(make: Make, config: dict[str, Any], why: str) -> None:
    """It was read as BERT's own, and the words were cut at spaces that Japanese does not have."""
    folder = make("bert", word_pieces(), plain=True, **config)
    with pytest.raises(CheckpointError, match=why):
        OurTokenizer.load(folder)


@pytest.mark.parametrize("config", [{"tokenizer_class": "RoFormerTokenizer"}, {}])
def test_a_tokenizer_whose_words_are_in_no_file_is_refused(make: Make, config: dict[str, Any]) -> None:
    """RoFormer's tokenizer.json has BERT's cuts in the place of jieba's, and was read with them."""
    with pytest.raises(CheckpointError, match="RoFormerTokenizer finds Chinese words by jieba"):
        OurTokenizer.load(make("roformer", word_pieces(), **config))
    OurTokenizer.load(make("roformer", word_pieces(), tokenizer_class="BertTokenizer"))


def test_tokens_of_an_older_folder_are_added_behind_its_vocabulary(make: Make) -> None:
    folder = make("bert", word_pieces(), plain=True, additional_special_tokens=["[E1]"])
    size = len((folder / "vocab.txt").read_text().splitlines())
    (folder / "added_tokens.json").write_text(json.dumps({"lionheart": size + 1, "[E1]": size}))
    theirs, ours = AutoTokenizer.from_pretrained(folder), OurTokenizer.load(folder)
    for text in ("a lionheart [E1] b", "[E1]"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    (folder / "added_tokens.json").write_text(json.dumps({"lionheart": size + 7}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        OurTokenizer.load(folder)
