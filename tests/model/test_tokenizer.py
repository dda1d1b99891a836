"""The tokenizer against ids that others computed: llama.cpp's vocabulary tests, SQuAD questions, transformers."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from model.errors import CheckpointError
from model.tokenizer import Tokenizer, TokenizerError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder ../shared/data is not here")

FOLDERS = {
    "gpt2": DATA / "tokenizers" / "gpt2",
    "bert": DATA / "tokenizers" / "bert-base-uncased",
    "stories": DATA / "stories260K-hf",
}
TEXTS = [
    "",
    " ",
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces, a tab\tand\n\nnewlines ",
    "naïve café — 你好，世界 🦙👩‍👩‍👧 مرحبا",
    "don't can't I'll we've 12,345.67 e-mail@example.org <s> [SEP] <|endoftext|>",
]


@pytest.fixture(params=list(FOLDERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.load(FOLDERS[name])


@pytest.fixture
def edited_folder(tmp_path: Path) -> Any:
    """Copies the stories260K tokenizer and changes its files: edited_folder(config={...}, tokenizer={...})."""

    def make(**changes: dict[str, Any]) -> Path:
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(FOLDERS["stories"] / file, tmp_path / file)
            (tmp_path / file).chmod(0o644)
        for stem, change in changes.items():
            path = tmp_path / f"{stem}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return tmp_path

    return make


def test_without_offsets_all_else_is_the_same(tokenizer: Tokenizer) -> None:
    asked = [*TEXTS, *zip(TEXTS, reversed(TEXTS), strict=True)]
    whole = [replace(encoding, offsets=[]) for encoding in tokenizer.encode_batch(asked)]
    assert tokenizer.encode_batch(asked, with_offsets=False) == whole


def test_without_offsets_a_pair_keeps_its_types_where_nothing_is_done_behind_the_model() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (found,) = Tokenizer(backend).encode_batch([("a b", "b")], with_offsets=False)
    assert (found.ids, found.type_ids, found.sequence_ids) == ([0, 1, 1], [0, 0, 1], [0, 0, 1])


@pytest.mark.parametrize(("folder", "cases"), [("gpt2", "gpt-2.json"), ("bert", "bert-bge.json")])
def test_ids_equal_those_of_the_vocabulary_tests_of_llama_cpp(folder: str, cases: str) -> None:
    tokenizer = Tokenizer.load(FOLDERS[folder])
    rows = json.loads((DATA / "tokenizers" / "llama.cpp-vocab-tests" / cases).read_text())["cases"]
    assert len(rows) == 47
    for row in rows:
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]


def test_ids_equal_those_of_ten_thousand_squad_questions() -> None:
    tokenizer = Tokenizer.load(FOLDERS["bert"])
    with gzip.open(FOLDERS["bert"] / "squad_dev_questions_expected_ids.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 10_570
    found = tokenizer.encode_batch([row["text"] for row in rows], add_special_tokens=False)
    assert [encoding.ids for encoding in found] == [row["ids"] for row in rows]


@pytest.mark.parametrize("special", [True, False])
def test_ids_and_text_equal_those_of_transformers(name: str, tokenizer: Tokenizer, special: bool) -> None:
    reference = AutoTokenizer.from_pretrained(FOLDERS[name])
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == reference(text, add_special_tokens=special)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=special) == reference.decode(ids, skip_special_tokens=special)


def test_pairs_equal_those_of_transformers() -> None:
    reference = AutoTokenizer.from_pretrained(FOLDERS["bert"])
    expected = reference("Who is it?", "It is I.", return_offsets_mapping=True, return_token_type_ids=True)
    tokenizer = Tokenizer.load(FOLDERS["bert"])
    found = tokenizer.encode_with_offsets("Who is it?", "It is I.")
    assert found.ids == expected["input_ids"]
    assert found.type_ids == expected["token_type_ids"]
    assert found.offsets == [tuple(span) for span in expected["offset_mapping"]]
    assert found.sequence_ids == expected.sequence_ids()
    assert len(found.ids) == len(tokenizer.encode("Who is it?It is I.", add_special_tokens=False)) + (
        tokenizer.num_special_tokens(pair=True)
    )


def test_offsets_name_the_characters_of_each_token() -> None:
    text = "The naïve llama."
    found = Tokenizer.load(FOLDERS["bert"]).encode_with_offsets(text, add_special_tokens=False)
    assert [text[start:end] for start, end in found.offsets] == ["The", "naïve", "ll", "ama", "."]


def test_truncation_and_padding_of_the_file_are_switched_off(edited_folder: Any) -> None:
    text = "Once upon a time there was a very long story. " * 20
    plain = Tokenizer.load(edited_folder()).encode(text)
    limits = {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 999},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        },
    }
    assert Tokenizer.load(edited_folder(tokenizer=limits)).encode(text) == plain
    assert len(plain) > 100


def test_special_ids_come_from_the_files_beside_the_tokenizer(edited_folder: Any) -> None:
    tokenizer = Tokenizer.load(edited_folder(tokenizer_config={"pad_token": {"content": "</s>", "lstrip": False}}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_tokens["bos_token"] == "<s>"
    assert tokenizer.vocab_size == 512


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_the_file_says_which_special_tokens_are_added_whatever_the_config_sets(
    edited_folder: Any, add_bos: bool, add_eos: bool
) -> None:
    folder = edited_folder(tokenizer_config={"add_bos_token": add_bos, "add_eos_token": add_eos})
    reference, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    assert tokenizer.encode("a story") == reference("a story")["input_ids"]
    assert tokenizer.encode_with_offsets("one", "two").ids == reference("one", "two")["input_ids"]


def test_tokens_that_only_the_config_knows_are_added_as_transformers_does(edited_folder: Any) -> None:
    entry = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    changes = {
        "added_tokens_decoder": {
            "512": {"content": "<|im_start|>", "special": True, **entry},
            "513": {"content": "<tool_call>", "special": False, **entry},
        },
        "extra_special_tokens": ["<|fim|>"],
    }
    folder = edited_folder(tokenizer_config=changes)
    reference, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    text = "<|im_start|>one <tool_call> two<|fim|>"
    assert tokenizer.encode(text) == reference(text)["input_ids"]
    assert tokenizer.is_special(512)
    assert not tokenizer.is_special(513)
    assert tokenizer.decode([512, 513], skip_special_tokens=True) == "<tool_call>"


def test_lone_surrogates_and_impossible_ids_are_typed_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="Unicode"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(TokenizerError, match="Unicode"):
        tokenizer.encode_batch(["fine", "a\udfff"])
    for id in (-1, 2**33):
        with pytest.raises(TokenizerError):
            tokenizer.decode([id])
    with pytest.raises(TokenizerError, match="token id 999999 at position 1"):
        tokenizer.check_ids([5, 999_999])
    assert tokenizer.token(999_999) is None
    assert tokenizer.token(-1) is None


def test_missing_and_broken_files_are_named(tmp_path: Path, edited_folder: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no tokenizer\.json"):
        Tokenizer.load(empty)
    folder = edited_folder()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(folder)
