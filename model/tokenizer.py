"""A checkpoint's tokenizer: text to ids, with pairs and offsets, and back, exactly as `transformers` does it.

Wraps `tokenizers` and the files beside `tokenizer.json`; needs neither torch nor transformers. Truncation and padding
that a checkpoint sets in its own file are switched off: what is too long is refused by those who know the limit.
Knows nothing of threads: `encode` of a long text takes milliseconds, and callers decide where. Runs in the API process.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from model.detokenizer import IncrementalDetokenizer, Pieces
from model.errors import CheckpointError
from model.plain_vocabularies import plain_backend
from model.sentencepiece_families import sentencepiece_backend
from model.tokenizer_settings import apply_settings, check_class

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKEN_ID = 2**32 - 1


class TokenizerError(ValueError):
    """A text or an id that no tokenizer can take (a lone surrogate, an id that is not in the vocabulary)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Ids with where they come from: `offsets` are character spans (empty where nobody asked for them), `sequence_ids`
    the text of a pair (or None)."""

    ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int]]
    sequence_ids: list[int | None]
    special_tokens_mask: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """What stands beside tokenizer.json: tokenizer_config.json, with special_tokens_map.json where it adds names."""

    special_tokens: dict[str, str] = field(default_factory=dict)
    extra_special_tokens: tuple[str, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()
    model_max_length: int | None = None
    chat_template: str | dict[str, str] | None = None


class Tokenizer:
    """Immutable once made; its methods may be called from several threads."""

    def __init__(self, backend: Backend, config: TokenizerConfig | None = None) -> None:
        self.config = config or TokenizerConfig()
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        _add_missing_tokens(backend, self.config)
        self._added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the highest id. A checkpoint's own `vocab_size` may be larger (padded embeddings)."""
        self.special_ids: frozenset[int] = frozenset(id for id, token in self._added.items() if token.special)
        self.special_tokens: dict[str, str] = self.config.special_tokens
        """Role to token, like {"bos_token": "<s>"}; chat templates are given these."""
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads `tokenizer.json`, or SentencePiece or plain vocabulary files in its place, and what stands beside it.

        Raises:
            CheckpointError: a file is missing or is not what it should be.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return cls(_made_of_other_files(folder), load_tokenizer_config(folder))
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}", file=path.name) from error
        tokenizer = cls(backend, load_tokenizer_config(folder))
        apply_settings(backend, _read_json(folder / "config.json"), _read_files(folder))
        return tokenizer

    # -- text to ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._encode(text, None, add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> Encoding:
        """One text, or a pair as the checkpoint joins them."""
        return _encoding(self._encode(text, pair, add_special_tokens))

    def encode_batch(
        self, texts: Sequence[str | tuple[str, str]], *, add_special_tokens: bool = True, with_offsets: bool = True
    ) -> list[Encoding]:
        """Many texts or pairs at once, in parallel where the machine has cores to spare; a fifth faster where nobody
        asks for the offsets (which are left empty then)."""
        # Without a post-processor the fast way has no types for a pair's second text.
        fast = not with_offsets and self.backend.post_processor is not None
        encode = self.backend.encode_batch_fast if fast else self.backend.encode_batch
        try:
            batch = encode(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise TokenizerError("a text has characters that are not valid Unicode (lone surrogates)") from error
        return [_encoding(found, with_offsets=with_offsets) for found in batch]

    def num_special_tokens(self, *, pair: bool = False) -> int:
        """How many ids `encode` adds to a text's (or a pair's) own."""
        count: int = self.backend.num_special_tokens_to_add(pair)
        return count

    def _encode(self, text: str, pair: str | None, add_special_tokens: bool) -> Any:
        try:
            return self.backend.encode(text, pair, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise TokenizerError("the text has characters that are not valid Unicode (lone surrogates)") from error

    # -- ids to text --------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids that the vocabulary does not have add nothing; call `check_ids` first where that would be a fault.

        Raises:
            TokenizerError: an id is negative or past 32 bits.
        """
        try:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise TokenizerError("a token id is negative or too large") from error
        return text

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling (`Ġworld`, `▁world`, `<0x0A>`); None for an id that it does not have."""
        piece: str | None = self.backend.id_to_token(id) if 0 <= id <= MAX_TOKEN_ID else None
        return piece

    def token_id(self, token: str) -> int | None:
        id: int | None = self.backend.token_to_id(token)
        return id

    def is_special(self, id: int) -> bool:
        return id in self.special_ids

    def added_among(self, texts: Sequence[str]) -> dict[str, int]:
        """Those of the texts that are tokens of their own, special or not: they are never put together from others."""
        found = {text: self.token_id(text) for text in texts}
        return {text: id for text, id in found.items() if id in self._added}

    def check_ids(self, ids: Sequence[int], *, vocab_size: int | None = None) -> None:
        """Raises TokenizerError that names the first id outside the vocabulary (of the model where given)."""
        limit = vocab_size if vocab_size is not None else self.vocab_size
        for position, id in enumerate(ids):
            if not 0 <= id < limit:
                raise TokenizerError(f"token id {id} at position {position} is outside the vocabulary of {limit:,}")

    @cached_property
    def max_token_bytes(self) -> int:
        """The UTF-8 length of the longest token: n bytes of text give at least n / max_token_bytes tokens."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return max((len(token.encode("utf-8", "replace")) for token in vocabulary), default=1) or 1

    @cached_property
    def pieces(self) -> Pieces:
        """What each id adds to a text; shared by all detokenizers of this checkpoint."""
        return Pieces(self.backend)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, keep: frozenset[int] = frozenset(), continues: bool = False
    ) -> IncrementalDetokenizer:
        """A new stream of text. `keep` are special ids to show all the same; `continues` as in the class."""
        skip = self.special_ids - keep if skip_special_tokens else frozenset()
        return IncrementalDetokenizer(self.pieces, skip=skip, continues=continues)

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.token_id(token)


def _encoding(found: Any, *, with_offsets: bool = True) -> Encoding:
    return Encoding(
        ids=found.ids,
        type_ids=found.type_ids,
        offsets=found.offsets if with_offsets else [],
        sequence_ids=found.sequence_ids,
        special_tokens_mask=found.special_tokens_mask,
    )


def load_tokenizer_config(folder: Path) -> TokenizerConfig:
    """tokenizer_config.json wins over special_tokens_map.json; both may be absent."""
    config = _read_files(folder)
    special = {name: text for name in SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    if isinstance(extra, dict):
        special.update({name: text for name, value in extra.items() if (text := _token_text(value)) is not None})
        extra = ()
    entries = config.get("added_tokens_decoder") or {}
    added = tuple(_added_token(entries[key]) for key in sorted(entries, key=int) if isinstance(entries[key], dict))
    length = config.get("model_max_length")
    return TokenizerConfig(
        special_tokens=special,
        extra_special_tokens=tuple(text for value in extra if (text := _token_text(value)) is not None),
        added_tokens=added,
        model_max_length=int(length) if isinstance(length, (int, float)) and 0 < length < 10**9 else None,
        chat_template=_named_templates(config.get("chat_template")),
    )


def _read_files(folder: Path) -> dict[str, Any]:
    return {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}", file=path.name) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", file=path.name)
    return content


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
    return AddedToken(str(entry.get("content", "")), special=bool(entry.get("special", False)), **flags)


def _named_templates(value: object) -> str | dict[str, str] | None:
    """The list form [{"name": ..., "template": ...}] becomes a dict."""
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    return value if isinstance(value, str) else None


def _add_missing_tokens(backend: Backend, config: TokenizerConfig) -> None:
    """Tokens that only the files beside tokenizer.json know (`transformers` adds them in the same order)."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in config.added_tokens if token.content and token.content not in known]
    named = [*config.special_tokens.values(), *config.extra_special_tokens]
    planned = known | {token.content for token in missing}
    new = [text for text in dict.fromkeys(named) if text and text not in planned]
    missing.extend(AddedToken(text, special=True, normalized=False) for text in new)
    if missing:
        backend.add_tokens(missing)


def _made_of_other_files(folder: Path) -> Backend:
    config = _read_files(folder)
    check_class(_read_json(folder / "config.json"), config)
    backend = sentencepiece_backend(folder) or plain_backend(folder)
    if backend is None:
        raise CheckpointError(f"{folder.name} has no tokenizer.json", file="tokenizer.json")
    _add_listed_tokens(backend, folder, config)
    return backend


def _add_listed_tokens(backend: Backend, folder: Path, config: dict[str, Any]) -> None:
    """The tokens of `added_tokens.json`, which older folders have in place of `added_tokens_decoder`.

    Raises: CheckpointError if one would get another id than the file says.
    """
    listed = {} if config.get("added_tokens_decoder") else _read_json(folder / "added_tokens.json")
    special = {text for name in SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    special |= {text for value in config.get("additional_special_tokens") or () if (text := _token_text(value))}
    for token, id in sorted(listed.items(), key=lambda item: int(item[1])):
        backend.add_tokens([AddedToken(token, special=token in special, normalized=token not in special)])
        if backend.token_to_id(token) != id:
            message = f"added_tokens.json gives {token!r} the id {id}; behind the vocabulary it has another"
            raise CheckpointError(message, file="added_tokens.json")
