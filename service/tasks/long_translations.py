"""Texts translated whole, however long: what is past a checkpoint's reach goes through it in pieces of sentences.

Nothing is cut: the pieces hold the whole text, and what stood between them (a paragraph's end) stands between their
translations. Knows neither HTTP nor which checkpoint was chosen. Runs in the API process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from model.languages import match
from service.errors import ContextLengthExceeded
from service.tasks.generation import Prompt
from service.tasks.instructing import Commission, Spent, Writer, side_by_side
from service.tasks.pieces import fitting_pieces
from service.tasks.sampling import context_limit
from service.tasks.serial_text import SerialText

GROWTH = 1.5
"""A translation may have so many times as many tokens as its text: pieces leave room for that."""
SPACELESS = ("zh", "yue", "ja", "th", "lo", "km", "my")
"""Languages that put no space between sentences."""


@dataclass(slots=True, kw_only=True)
class Translated:
    text: str
    finish_reason: str
    spent: Spent
    num_pieces: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """One prompt for each piece, and what goes between what comes of them."""

    prompts: Sequence[Prompt]
    joints: Sequence[str]


class Translator:
    """Has texts translated by one checkpoint into `target`."""

    def __init__(self, writer: Writer, commission: Commission, target: str | None) -> None:
        self._writer = writer
        self._commission = commission
        self._space = "" if target is not None and match(target, SPACELESS) else " "

    async def translate(self, text: str, *, truncate: bool) -> Translated:
        """`truncate`: what does not fit is left out and counted, in place of going piece by piece."""
        pieces = await self.cut(text, truncate=truncate)
        model = self._commission.model
        written = await side_by_side([partial(self._writer.write, model, prompt) for prompt in pieces.prompts])
        texts = [part.texts[0] for part in written]
        reasons = [part.finish_reasons[0] for part in written]
        spent = [part.spent for part in written]
        return Translated(
            text=texts[0] + "".join(joint + part for joint, part in zip(pieces.joints, texts[1:], strict=True)),
            finish_reason=next((reason for reason in reasons if reason != "stop"), "stop"),
            spent=spent[0] if len(spent) == 1 else Spent.total(part.as_piece() for part in spent),
            num_pieces=len(spent),
        )

    def start(self, pieces: Pieces) -> SerialText:
        """The translation under way, to be closed by the caller."""
        return SerialText(self._writer, self._commission.model, pieces.prompts, pieces.joints)

    async def cut(self, text: str, *, truncate: bool) -> Pieces:
        """Raises: InvalidRequest (ContextLengthExceeded among them), naming the field at fault."""
        commission = self._commission
        if truncate:
            return Pieces([await commission.prompt(text, truncate=True)], [])
        try:
            prompt = await commission.prompt(text)
            if await self._leaves_room(prompt):
                return Pieces([prompt], [])
        except ContextLengthExceeded:
            if commission.choices.min_tokens is not None:
                raise  # of the whole text or of each piece? Nobody could tell
        room = await commission.room()
        if commission.choices.max_tokens is None:
            room = min(room, max(1, int(commission.max_tokens / GROWTH)))
        spans = await fitting_pieces(commission, text, room)
        gaps = [text[one.end : other.start] for one, other in pairwise(spans)]
        prompts = [await commission.prompt(text[span.start : span.end]) for span in spans]
        return Pieces(prompts, [gap if "\n" in gap else self._space for gap in gaps])

    async def _leaves_room(self, prompt: Prompt) -> bool:
        """Whether the translation can be written to its end, as far as the checkpoint leaves that to us.

        An encoder-decoder's own limit is part of what it was trained to do, and the caller's is the caller's.
        """
        commission = self._commission
        if commission.is_sequence_to_sequence or commission.choices.max_tokens is not None:
            return True
        around = context_limit(commission.model) - commission.max_tokens - await commission.room()
        return (prompt.num_tokens - around) * GROWTH <= commission.max_tokens
