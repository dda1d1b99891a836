"""Ids to text as they come, each id once: what has been given out is never wrong and never changes.

`Pieces` knows what one id adds to a text, worked out from the checkpoint's decoder; `IncrementalDetokenizer` joins the
pieces, holds back what may still become something else (half a character), and ends with the text that decoding all ids
at once would give. Knows nothing of stop strings or requests. Runs in the API process, on its event loop.
"""

import json
import re
from codecs import utf_8_decode
from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

Kind = Literal["bytes", "byte_fallback", "local", "window"]
REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ANCHOR = "a"
"""A token that every decoder leaves as it is: what follows it is decoded as in the middle of a text."""


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters to bytes: printable Latin-1 for themselves, the rest from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
    assert set(table) == set(ByteLevel.alphabet())
    return table


class Pieces:
    """What each id of a checkpoint adds to a text.

    Kinds: `bytes` (byte-level BPE: the bytes of all tokens, read as UTF-8), `byte_fallback` (text tokens, and byte
    tokens whose runs are UTF-8 or nothing), `local` (each token has a form at the start and one elsewhere: WordPiece,
    Metaspace), `window` (any other decoder: decode the last few ids again).
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        steps = _decoder_steps(backend)
        self.kind: Kind = _kind(steps)
        strips = [step["start"] for step in steps or () if step["type"] == "Strip"]
        self.strip_start: int = sum(strips) if self.kind == "byte_fallback" else 0
        """Spaces that the decoder takes from the start of the whole text."""
        self._has_decoder = steps is not None
        self._has_byte_tokens = any(step["type"] == "ByteFallback" for step in steps or ())
        self._alphabet = byte_alphabet() if self.kind == "bytes" else {}
        self._first: dict[int, str | bytes] = {}
        self._later: dict[int, str | bytes] = {}

    def later(self, id: int) -> str | bytes:
        """What the id adds after other text: str where it stands for itself, else bytes that need their neighbours."""
        piece = self._later.get(id)
        if piece is None:
            piece = self._later[id] = self._make(id, first=False)
        return piece

    def first(self, id: int) -> str | bytes:
        """What the id adds as the first one; leading spaces that belong to `strip_start` are still there."""
        if self.kind != "local":
            return self.later(id)
        piece = self._first.get(id)
        if piece is None:
            piece = self._first[id] = self._make(id, first=True)
        return piece

    def as_bytes(self, id: int) -> bytes:
        """The id's own bytes, as in the middle of a text."""
        piece = self.later(id)
        return piece if isinstance(piece, bytes) else piece.encode()

    def _make(self, id: int, *, first: bool) -> str | bytes:
        token: str | None = self.backend.id_to_token(id)
        if token is None:  # an id of padded embeddings: nothing, and no end to a run of bytes either
            return b""
        if self.kind == "bytes":
            return self._bytes_or_text(token)
        if self._has_byte_tokens and self.kind != "window" and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if not self._has_decoder:
            return token if first else " " + token
        decode = self.backend.decoder.decode
        text: str = decode([token]) if first else decode([ANCHOR, token])[len(ANCHOR) :]
        return text

    def _bytes_or_text(self, token: str) -> str | bytes:
        values = [self._alphabet.get(character) for character in token]
        if None in values:  # an added token with characters outside the alphabet stands for itself
            return token
        data = bytes(value for value in values if value is not None)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data


class IncrementalDetokenizer:
    """One text in the making. `continues` says that it goes on from other text (so no leading space is dropped)."""

    def __init__(self, pieces: Pieces, *, skip: frozenset[int] = frozenset(), continues: bool = False) -> None:
        self._pieces = pieces
        self._skip = skip
        self._first = not continues
        self._strip = 0 if continues else pieces.strip_start
        self._held = b""
        self._window: list[int] = []
        self._num_given = 0
        self._window_given = ""
        self._add = {
            "bytes": self._add_bytes,
            "byte_fallback": self._add_byte_fallback,
            "local": self._add_local,
            "window": self._add_window,
        }[pieces.kind]

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now that `ids` have come; "" while a character is incomplete."""
        skip, add = self._skip, self._add
        text = "".join([add(id) for id in ids if id not in skip])
        return self._stripped(text) if self._strip and text else text

    @property
    def pending(self) -> str:
        """What `flush` would give now."""
        text = self._rest()
        return text[self._leading(text) :] if self._strip else text

    def flush(self) -> str:
        """The rest, once no further id comes; an incomplete character shows as U+FFFD, as in a full decode."""
        text = self._rest()
        self._held, self._window, self._window_given, self._num_given = b"", [], "", 0
        return self._stripped(text) if self._strip and text else text

    def _add_bytes(self, id: int) -> str:
        piece = self._pieces.later(id)
        if not self._held and isinstance(piece, str):
            return piece
        data = self._held + (piece.encode() if isinstance(piece, str) else piece)
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def _add_byte_fallback(self, id: int) -> str:
        """A run of byte tokens is a whole: valid UTF-8, or every byte of it is U+FFFD. So it is held to its end."""
        piece = self._pieces.later(id)
        if isinstance(piece, bytes):
            self._held += piece
            return ""
        if not self._held:
            return piece
        text = self._rest() + piece
        self._held = b""
        return text

    def _add_local(self, id: int) -> str:
        piece = self._pieces.first(id) if self._first else self._pieces.later(id)
        if isinstance(piece, bytes):
            return ""
        self._first = False
        return piece

    def _add_window(self, id: int) -> str:
        """Decodes the ids since the last certain text again, behind the ids of that text."""
        self._window.append(id)
        text = self._decode_window()
        if text.endswith(REPLACEMENT) or not text.startswith(self._window_given):
            return ""
        new = text[len(self._window_given) :]
        if new:
            self._window = self._window[self._num_given :]
            self._num_given = len(self._window)
            self._window_given = self._decode_window()
        return new

    def _rest(self) -> str:
        kind = self._pieces.kind
        if kind == "window":
            return self._decode_window()[len(self._window_given) :]
        if not self._held:
            return ""
        if kind == "bytes":
            return self._held.decode("utf-8", "replace")
        try:
            return self._held.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._held)

    def _decode_window(self) -> str:
        text: str = self._pieces.backend.decode(self._window, skip_special_tokens=False)
        return text

    def _leading(self, text: str) -> int:
        return min(len(text) - len(text.lstrip(" ")), self._strip)

    def _stripped(self, text: str) -> str:
        """Text has begun: what the decoder takes from the start of the whole text is taken here, once."""
        start = self._leading(text)
        # The spaces to take may be spread over several outputs; anything else ends the start of the text.
        self._strip = self._strip - start if start == len(text) else 0
        return text[start:]


def _decoder_steps(backend: Backend) -> list[dict[str, Any]] | None:
    """The decoder of tokenizer.json as a flat list of steps; None where tokens are joined by spaces."""
    if backend.decoder is None:
        return None
    spec: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return list(spec["decoders"]) if spec["type"] == "Sequence" else [spec]


def _kind(steps: list[dict[str, Any]] | None) -> Kind:
    if steps is None:
        return "local"
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "bytes"
    if names in (["WordPiece"], ["Metaspace"]):
        return "local"
    strips = [step for step in steps if step["type"] == "Strip"]
    fused = names.index("Fuse") if "Fuse" in names else len(names)
    whole_text = names[fused + 1 :]
    local = set(names[:fused]) <= {"Replace", "ByteFallback"} and set(whole_text) <= {"Strip"}
    if local and all(step["stop"] == 0 and step["content"] == " " for step in strips):
        return "byte_fallback"
    return "window"
