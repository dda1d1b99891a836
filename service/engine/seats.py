"""Who of those that the worker holds has a place in its batch, as far as can be told without asking it.

The worker is given a few more than its batch takes, so that it never runs dry; those stand beside it and still wait.
Who is given it while there is a place has one, the next in line gets it when somebody leaves, and whoever is known to
be computed has one whatever was thought before. Pure data. Runs in the API process.
"""

from service.engine.flight import Flight


class Seats:
    """`limit` is what a batch holds, in rows or in tokens; what is larger than that may have it to itself."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seated: dict[int, int] = {}
        self._num_taken = 0
        self._standing: dict[int, tuple[Flight, int]] = {}
        self._shares: dict[str, tuple[int, int]] = {}
        self.num_standing_tokens = 0

    @property
    def num_standing(self) -> int:
        return len(self._standing)

    def share_of(self, client: str) -> tuple[int, int]:
        """How many requests, with how many tokens, of this client stand."""
        return self._shares.get(client, (0, 0))

    def fits(self, size: int) -> bool:
        """Whether one that takes `size` of the limit would have a place, with nobody standing before it."""
        return not self._standing and self._has_place(size)

    def enter(self, flight: Flight, size: int) -> None:
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
        self._num_taken -= self._seated.pop(number, 0)
        self._stand_no_more(number)
        while self._standing and self._has_place(self._standing[head := next(iter(self._standing))][1]):
            self.started(head)

    def _has_place(self, size: int) -> bool:
        return not self._seated or self._num_taken + size <= self._limit

    def _seat(self, number: int, size: int) -> None:
        self._seated[number] = size
        self._num_taken += size

    def _stand_no_more(self, number: int) -> int | None:
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
