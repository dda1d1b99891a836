"""A text longer than a checkpoint's context, shortened piece by piece until it is one piece.

Knows neither tokens nor how a piece is shortened. Runs in the API process.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from service.errors import GenerationFailed

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
