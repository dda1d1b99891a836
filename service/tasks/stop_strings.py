"""Finds the first stop string in a text that comes in pieces, and lets nothing past it out.

What comes out does not depend on how the text was cut: the stop that is complete first, reading character by
character, wins (of two that end together, the longer). Text that may turn out to be the beginning of a stop is held
back until that is decided. Pure; one object per text.
"""

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str], *, inclusive: bool = False) -> None:
        """`stops` are non-empty; none at all is fine and costs nothing. `inclusive`: the stop itself goes out, too."""
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._inclusive = inclusive
        self._held = ""
        self.found: str | None = None
        """The stop that ended the text."""

    def __bool__(self) -> bool:
        return bool(self._stops)

    def feed(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what may go out, and whether a stop ended the text (feed no more then)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = self._first(text)
        if found is not None:
            start, end = found
            self._held, self.found = "", text[start:end]
            return text[: end if self._inclusive else start], True
        start = self._undecided(text)
        self._held = text[start:]
        return text[:start], False

    def would_stop(self, text: str) -> bool:
        """Whether `feed(text)` would end the text."""
        return bool(self._stops) and self._first(self._held + text) is not None

    def flush(self) -> str:
        """The text that was held back, now that nothing follows it."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str) -> tuple[int, int] | None:
        """Where the stop that is complete first begins and ends."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else (best[1], best[0])

    def _undecided(self, text: str) -> int:
        """Where the longest ending of `text` begins that begins a stop string; `len(text)` if none does."""
        earliest = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
            while 0 <= start < earliest:
                if stop.startswith(text[start:]):
                    earliest = start
                start = text.find(stop[0], start + 1)
        return earliest
