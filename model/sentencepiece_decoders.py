"""Tokenizers of language models that have a `tokenizer.model` of SentencePiece and no `tokenizer.json`.

Ids are the pieces' places; what the files beside it call special is. Knows how texts are cut only as
`model.sentencepiece_reader`. Runs in the API process.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from model.architectures.raw import read_json
from model.errors import CheckpointError
from model.plain_vocabularies import text_of
from model.sentencepiece_reader import SPACE, SentencePieceModel, make_backend, put_around, read_sentencepiece

Config = Mapping[str, Any]


def llama(folder: Path, config: Config) -> Tokenizer:
    """A text's start gets a space; what follows a special token gets one only where `legacy` is set."""
    model = read_sentencepiece(folder / "tokenizer.model")
    if config.get("add_prefix_space") is False:
        model = replace(model, add_dummy_prefix=False)
    backend = _numbered_as_stored(folder, model, config)
    backend.normalizer = normalizers.Sequence(model.character_steps)
    scheme = "never" if not model.add_dummy_prefix else "always" if config.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    return _opened(backend, config, start="<s>", end="</s>")


def gemma(folder: Path, config: Config) -> Tokenizer:
    model = read_sentencepiece(folder / "tokenizer.model")
    return _opened(_numbered_as_stored(folder, model, config), config, start="<bos>", end="<eos>")


def listed_tokens(folder: Path, config: Config) -> list[str]:
    """The special tokens that a folder's files list without a role."""
    path = folder / "special_tokens_map.json"
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if not listed and path.is_file():
        listed = read_json(path).get("additional_special_tokens")
    return [str(entry.get("content") if isinstance(entry, dict) else entry) for entry in listed or []]


def _numbered_as_stored(folder: Path, model: SentencePieceModel, config: Config) -> Tokenizer:
    """Special is what the model never cuts a text into, and what the files beside it say."""
    added = (config.get("added_tokens_decoder") or {}).values()
    named = {*listed_tokens(folder, config), *(entry["content"] for entry in added if entry.get("special"))}
    special = [piece.text for piece in model.pieces if piece.role in ("control", "unknown") or piece.text in named]
    return make_backend(model, model.vocabulary, unknown_id=model.unknown_id, special=special)


def _opened(backend: Tokenizer, config: Config, *, start: str, end: str) -> Tokenizer:
    """Puts a start before each text, and an end behind it where the config asks for one."""
    before = [text_of(config, "bos_token", start)] if config.get("add_bos_token", True) else []
    after = [text_of(config, "eos_token", end)] if config.get("add_eos_token", False) else []
    for token in (*before, *after):
        if backend.token_to_id(token) is None:
            raise CheckpointError(f"tokenizer.model has no {token!r}", file="tokenizer.model")
    return put_around(backend, before=before, after=after, between=[*after, *before])
