"""Tokenizers of GGUF files where llama.cpp goes by more than the file's own types: by names of tokens and of models."""

from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError
from model.gguf.container import GgufFile
from model.gguf.facts import Facts
from model.gguf.vocabularies import ends_of_text, write_tokenizer
from model.tokenizer import Tokenizer
from tests.model.gguf.conftest import Write
from tests.model.gguf.test_broken import EMBEDDING, LLAMA, WORDS

PIECES: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}


def ends(path: Path) -> list[int]:
    with GgufFile(path) as file:
        return ends_of_text(Facts([file]))


def tokenizer(path: Path) -> Tokenizer:
    with GgufFile(path) as file:
        write_tokenizer(Facts([file]), path.parent)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(path.parent)


def pieces(*tokens: tuple[str, int], **keys: Any) -> dict[str, Any]:
    """SentencePiece's keys for tokens with their types, behind `<unk>`, `<s>` and `</s>`."""
    listed = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *tokens]
    texts, types = zip(*listed, strict=True)
    scores = [-float(id) for id in range(len(listed))]
    names = {"tokens": list(texts), "token_type": list(types), "scores": scores, "add_bos_token": False} | keys
    return LLAMA | PIECES | {f"tokenizer.ggml.{name}": value for name, value in names.items()}


@pytest.mark.parametrize("end", ["<|im_end|>", "<|return|>", "[EOS]", "_<EOT>", "<end_of_utterance>"])
@pytest.mark.parametrize("types", [{}, {"tokenizer.ggml.token_type": [1, 4, 1, 1]}])
def test_an_end_of_a_turn_is_one_by_its_text_whatever_its_type(write: Write, end: str, types: dict[str, Any]) -> None:
    """Only tokens of the type `control` counted, so that many a chat went on behind its end."""
    path = write(LLAMA | WORDS | {"tokenizer.ggml.tokens": ["a", end, "b", "ab"]} | types, EMBEDDING)
    assert ends(path) == [1]
    found = tokenizer(path)
    assert found.encode(f"a{end}b") == [0, 1, 2]
    assert found.decode([0, 1, 2]) == "ab"


def test_the_end_of_a_message_within_a_turn_is_none(write: Write) -> None:
    tokens = ["<|end|>", "<|call|>", "<|return|>", "a"]
    assert ends(write(LLAMA | WORDS | {"tokenizer.ggml.tokens": tokens}, EMBEDDING)) == [1, 2]
    assert ends(write(LLAMA | WORDS | {"tokenizer.ggml.tokens": ["<|end|>", "<|call|>"]}, EMBEDDING)) == [0, 1]


@pytest.mark.parametrize(("name", "strips"), [("Phi 3 Mini", True), ("phi3", True), ("Phi-3-mini", True), ("P", False)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_special_tokens_of_phi_3_take_the_spaces_behind_them(
    write: Write, name: str, kind: str, *, strips: bool
) -> None:
    keys = pieces(("▁" if kind == "llama" else "Ġ", 1), ("a", 1), ("<|user|>", 3), ("<|tool|>", 4)) | {
        "general.name": name, "tokenizer.ggml.model": kind
    }  # fmt: skip
    found = tokenizer(write(keys, EMBEDDING))
    space = [] if strips else [3]
    for special, id in (("<|user|>", 5), ("<|tool|>", 6), ("</s>", 2)):
        assert found.encode(f"{special} a") == [id, *space, 4]
    assert found.encode("<s> a") == [1, 3, 4]


def test_a_users_own_spaces_are_found_in_texts(write: Write) -> None:
    """They were kept as `▁▁▁`, which no text has, and one of them beside `▁` was taken for the same token."""
    found = tokenizer(write(pieces(("▁", 1), ("a", 1), ("   ", 4), (" ", 4)), EMBEDDING))
    assert found.encode("a   a a") == [4, 5, 4, 6, 4]
    assert found.decode([4, 5, 4, 6, 4]) == "a   a a"


def test_a_token_of_many_thousand_characters_is_refused(write: Write, tmp_path: Path) -> None:
    path = write(pieces(("a" * 5000, 1)), EMBEDDING)
    with GgufFile(path) as file, pytest.raises(CheckpointError, match="has 5,000 characters; 4,096 are allowed"):
        write_tokenizer(Facts([file]), tmp_path)
