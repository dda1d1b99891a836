"""A text longer than a checkpoint's context, in pieces: where it is cut, and how pieces come together again.

Pieces end where sentences do, and only a sentence that is itself too long is cut between words. Knows what a piece's
tokens are, not what is done with it. Runs in the API process.
"""

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from service.errors import GenerationFailed
from service.tasks.sentences import Span, split_sentences

JOINT = "\n"
"""Between the results of pieces."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What is left of a long text, and how many pieces its first reading took (1: the text itself)."""

    text: str
    num_pieces: int


async def map_reduce(
    text: str,
    cut: Callable[[str], Awaitable[list[str]]],
    shorten: Callable[[Sequence[str]], Awaitable[list[str]]],
) -> Digest:
    """Shortens a text piece by piece until what the pieces gave is one piece.

    `cut` gives the pieces of a text, each of which `shorten` takes. Raises: GenerationFailed where pieces do not get
    shorter.
    """
    pieces = await cut(text)
    num_pieces = len(pieces)
    while len(pieces) > 1:
        text = JOINT.join(part for part in await shorten(pieces) if part)
        shorter = await cut(text)
        if len(shorter) >= len(pieces):
            raise GenerationFailed(f"{len(pieces):,} pieces of the text give summaries of {len(shorter):,} pieces")
        pieces = shorter
    return Digest(text, num_pieces)


def cut_text(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[str]:
    """Pieces of about equal length, none of more than `max_tokens`, in order and with all of the text's sentences.

    Raises: TokenizerError.
    """
    ends = [end for _, end in tokenizer.encode_with_offsets(text, add_special_tokens=False).offsets]
    if len(ends) <= max_tokens:
        return [text]
    parts = [part for span in split_sentences(text) for part in _cut_span(text, span, ends, max_tokens)]
    if not parts:
        return [text]
    target = -(-len(ends) // -(-len(ends) // max_tokens))
    pieces = [[parts[0]]]
    length = _num_tokens(parts[0], ends)
    for part in parts[1:]:
        more = _num_tokens(part, ends)
        if length >= target or length + more > max_tokens:
            pieces.append([])
            length = 0
        pieces[-1].append(part)
        length += more
    return [text[piece[0].start : piece[-1].end] for piece in pieces]


def _num_tokens(span: Span, ends: Sequence[int]) -> int:
    """A token is where it ends: many begin with the space before their word, and so in the sentence before."""
    return bisect_right(ends, span.end) - bisect_right(ends, span.start)


def _cut_span(text: str, span: Span, ends: Sequence[int], max_tokens: int) -> list[Span]:
    """The span, or where it has too many tokens, parts of it that end between words if they can."""
    parts: list[Span] = []
    first, end = span.start, span.end
    while True:
        at = bisect_right(ends, first)
        if bisect_right(ends, end) - at <= max_tokens:
            return [*parts, Span(first, end)] if first < end else parts
        stop = ends[at + max_tokens - 1]
        space = max((text.rfind(blank, first, stop + 1) for blank in " \n\t"), default=-1)
        stop = space if space > first else max(stop, first + 1)
        parts.append(Span(first, stop))
        first = stop
        while first < end and text[first].isspace():
            first += 1
