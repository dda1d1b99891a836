"""A text longer than a checkpoint's context, in pieces that fit: where it is cut.

Pieces end where sentences do, and only a sentence that is itself too long is cut between words. Knows what a piece's
tokens are, not what is done with it. Runs in the API process.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

from model.tokenizer import Tokenizer
from service.errors import ContextLengthExceeded
from service.tasks.instructing import Commission
from service.tasks.sentences import Span, split_sentences

MAX_PIECES = 1024


async def fitting_pieces(commission: Commission, text: str, room: int) -> list[Span]:
    """Pieces of about `room` tokens, each of which makes a prompt that fits.

    Raises: ContextLengthExceeded where there would be too many, or none that fits.
    """
    # A piece has at times some tokens more than the text has in its place.
    limit, model = room, commission.model
    context = model.description.context_length
    while limit > 0:
        spans = await asyncio.to_thread(cut_spans, model.tokenizer, text, limit)
        if len(spans) > MAX_PIECES:
            message = f"The text is more than {MAX_PIECES:,} times as long as what {model.name} reads"
            raise ContextLengthExceeded.of_context(context, message, param="input")
        try:
            for span in spans:
                await commission.prompt(text[span.start : span.end])
        except ContextLengthExceeded:
            limit = limit * 3 // 4
            continue
        return spans
    raise ContextLengthExceeded.of_context(context, f"The text cannot be cut for {model.name}", param="input")


def cut_text(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[str]:
    """The pieces' own texts. Raises: TokenizerError."""
    return [text[span.start : span.end] for span in cut_spans(tokenizer, text, max_tokens)]


def cut_spans(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[Span]:
    """Pieces of about equal length, none of more than `max_tokens`, in order and with all of the text's sentences.

    Raises: TokenizerError.
    """
    ends = [end for _, end in tokenizer.encode_with_offsets(text, add_special_tokens=False).offsets]
    if len(ends) <= max_tokens:
        return [Span(0, len(text))]
    parts = [part for span in split_sentences(text) for part in _cut_span(text, span, ends, max_tokens)]
    if not parts:
        return [Span(0, len(text))]
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
    return [Span(piece[0].start, piece[-1].end) for piece in pieces]


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
