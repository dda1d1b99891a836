"""Who of those that the worker holds has a place in its batch, as far as can be told without asking it.

The worker is given a few more than its batch takes, so that it never runs dry; those stand beside it and still wait.
Who is given it while there is a place has one, the next in line gets it when somebody leaves, and whoever is known to
be computed has one whatever was thought before. Pure data. Runs in the API process.
"""

from operator import add, le, sub

from service.engine.flight import Flight

Size = tuple[int, ...]


class Seats:
    """`limits` are what a batch holds, in rows, or in tokens and in texts; what is larger than one of them may have the
    batch to itself. A size has a number for each limit."""

    def __init__(self, *limits: int) -> None:
        self._limits = limits
        self._seated: dict[int, Size] = {}
        self._taken = tuple(0 for _ in limits)
        self._standing: dict[int, tuple[Flight, Size]] = {}
        self._shares: dict[str, tuple[int, int]] = {}
        self.num_standing_tokens = 0

    @property
    def num_standing(self) -> int:
        return len(self._standing)

    def share_of(self, client: str) -> tuple[int, int]:
        """How many requests, with how many tokens, of this client stand."""
        return self._shares.get(client, (0, 0))

    def fits(self, size: Size) -> bool:
        """Whether one that takes `size` of the limits would have a place, with nobody standing before it."""
        return not self._standing and self._has_place(size)

    def enter(self, flight: Flight, size: Size) -> None:
        if self.fits(size):
            self._seat(flight.number, size)
        else:
            self._standing[flight.number] = flight, size
            self._count(flight, 1)

    def started(self, number: int) -> None:
        """It is computed, whoever was before it."""
        if (size := self._stand_no_more(number)) is not None:
            self._seat(number, size)

    def leave(self, number: int) -> None:
        if (size := self._seated.pop(number, None)) is not None:
            self._taken = tuple(map(sub, self._taken, size))
        self._stand_no_more(number)
        while self._standing and self._has_place(self._standing[head := next(iter(self._standing))][1]):
            self.started(head)

    def _has_place(self, size: Size) -> bool:
        return not self._seated or all(map(le, map(add, self._taken, size), self._limits))

    def _seat(self, number: int, size: Size) -> None:
        self._seated[number] = size
        self._taken = tuple(map(add, self._taken, size))

    def _stand_no_more(self, number: int) -> Size | None:
        """Returns its size if it stood."""
        if (entry := self._standing.pop(number, None)) is None:
            return None
        flight, size = entry
        self._count(flight, -1)
        return size

    def _count(self, flight: Flight, sign: int) -> None:
        num_requests, num_tokens = self.share_of(flight.client)
        share = num_requests + sign, num_tokens + sign * flight.cost_tokens
        self._shares[flight.client] = share
        if not share[0]:
            del self._shares[flight.client]
        self.num_standing_tokens += sign * flight.cost_tokens
