"""Reads SentencePiece models (`spiece.model`, `source.spm`) as `tokenizers` backends, without their own library.

The file is a protocol buffer of which a few fields matter: pieces with scores, the kind of model, the map of the
normalizer. How a family of checkpoints numbers the pieces is `model.sentencepiece_families`. Runs in the API process.

Format: github.com/google/sentencepiece, src/sentencepiece_model.proto.
"""

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from model.errors import CheckpointError

MAX_MODEL_BYTES = 256 << 20
MAX_PIECE_CHARACTERS = 4096
"""The ways to cut a piece in two take the square of its length."""
SPACE = "▁"

Role = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]
ROLES: Mapping[int, Role] = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}
Kind = Literal["unigram", "bpe"]
KINDS: Mapping[int, Kind] = {1: "unigram", 2: "bpe"}


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a file says; `character_map` is what the Precompiled normalizer takes, empty for none."""

    pieces: tuple[Piece, ...]
    kind: Kind
    character_map: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    byte_fallback: bool

    @property
    def unknown_id(self) -> int:
        return next(index for index, piece in enumerate(self.pieces) if piece.role == "unknown")

    @property
    def vocabulary(self) -> list[tuple[str, float]]:
        """The pieces as `make_backend` takes them, for those who number them as the file does."""
        return [(piece.text, piece.score) for piece in self.pieces]

    @property
    def character_steps(self) -> list[Any]:
        """The normalizer of the model's own map of characters, if it has one."""
        return [normalizers.Precompiled(self.character_map)] if self.character_map else []


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises: CheckpointError if the file cannot be read, is no such model, or is one of words or characters."""
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_MODEL_BYTES:,} bytes", file=path.name)
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", file=path.name) from error
    try:
        return _model(data)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path.name} is not a SentencePiece model: {error}", file=path.name) from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(value))
            pieces.append(Piece(entry[1].decode(), struct.unpack("<f", entry[2])[0], ROLES[entry.get(3, 1)]))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not any(piece.role == "unknown" for piece in pieces):
        raise ValueError("it has no piece for what is unknown")
    kind = trainer.get(3, 1)
    if kind not in KINDS:
        raise ValueError("it cuts texts into words or characters, which is not implemented")
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=KINDS[kind],
        character_map=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and raw values of one message: int for varints, bytes for the rest."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            if kind != 2:
                raise ValueError(f"unknown wire type {kind}")
            length, place = _varint(data, place)
        if place + length > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Little-endian groups of 7 bits, the high bit set on all but the last: 0xAC 0x02 is 300."""
    value, shift = 0, 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def make_backend(
    model: SentencePieceModel,
    vocabulary: Sequence[tuple[str, float]],
    *,
    unknown_id: int,
    special: Sequence[str] = (),
    stripping: Collection[str] = (),
) -> Tokenizer:
    """A backend that cuts texts as the model does; ids are places in `vocabulary` (piece, score).

    `special` are tokens that are found in texts as they are and are left out of decoded ones; those in `stripping`
    take the spaces behind them. Raises: CheckpointError for a piece of a length that none has.
    """
    if longest := next((text for text, _ in vocabulary if len(text) > MAX_PIECE_CHARACTERS), None):
        raise CheckpointError(
            f"the token {longest[:20]!r}... has {len(longest):,} characters; {MAX_PIECE_CHARACTERS:,} are allowed"
        )
    backend = Tokenizer(_cutter(model, vocabulary, unknown_id))
    backend.normalizer = _normalizer(model)
    backend.decoder = _decoder(model)
    # What the model's maker wants whole has the score 0 in a unigram model, which no other way to cut it reaches.
    own = [piece.text for piece in model.pieces if piece.role == "user_defined" and model.kind == "bpe"]
    known = {text for text, _ in vocabulary}
    own = [text for text in own if text in known and text not in special]
    backend.add_tokens([AddedToken(text, normalized=False, rstrip=text in stripping) for text in own])
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, special=True, rstrip=text in stripping) for text in special]
    )
    return backend


def _cutter(model: SentencePieceModel, vocabulary: Sequence[tuple[str, float]], unknown_id: int) -> models.Model:
    if model.kind == "unigram":
        return models.Unigram(list(vocabulary), unk_id=unknown_id, byte_fallback=model.byte_fallback)
    return models.BPE(
        {text: index for index, (text, _) in enumerate(vocabulary)},
        _merges(vocabulary),
        unk_token=vocabulary[unknown_id][0],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def put_around(
    backend: Tokenizer, *, before: Sequence[str] = (), after: Sequence[str] = (), between: Sequence[str] = ()
) -> Tokenizer:
    """Sets the special tokens that are put around a text, or around and between a pair."""
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *between, *after])]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *between, "$B", *after], special_tokens=ids
    )
    return backend


def _normalizer(model: SentencePieceModel) -> normalizers.Sequence:
    """All that happens before a text is cut; it is cut as a whole, since pieces may reach over spaces."""
    steps = [*model.character_steps, normalizers.Replace(SPACE, " ")]
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> Any:
    if not model.byte_fallback:
        return decoders.Metaspace(replacement=SPACE, prepend_scheme="always" if model.add_dummy_prefix else "never")
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def _merges(vocabulary: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """The pairs that make up each piece, best score first: SentencePiece's BPE joins whatever gives the best piece."""
    ids = {text: index for index, (text, _) in enumerate(vocabulary)}
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, score in vocabulary:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
