"""Who is next: accepted requests wait here, in the API process, until the worker has room for them.

Order: higher priority first; among equals the client that has been served the fewest tokens (start-time fair queueing,
Goyal et al. 1996), so that one flooding client cannot starve another; within a client first come, first served.
Pure data: no clock, no I/O. Runs in the API process.
"""

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple


class _Ticket(NamedTuple):
    """In the order in which a client's requests are taken; numbers differ."""

    negative_priority: int
    number: int
    cost_tokens: int


@dataclass(slots=True)
class _Client:
    served_tokens: float = 0.0
    waiting: list[_Ticket] = field(default_factory=list)
    num_requests: int = 0
    num_tokens: int = 0


class FairQueue:
    """Holds request numbers; `push` again with the same number (a replay) puts a request back where it stood."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._live: dict[int, tuple[str, int]] = {}
        self._virtual_time = 0.0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, number: int) -> bool:
        return number in self._live

    def push(self, number: int, *, client: str, priority: int, cost_tokens: int) -> None:
        entry = self._clients.get(client)
        if entry is None:
            entry = self._clients[client] = _Client(self._virtual_time)
        elif not entry.waiting:
            entry.served_tokens = max(entry.served_tokens, self._virtual_time)
        heapq.heappush(entry.waiting, _Ticket(-priority, number, cost_tokens))
        self._live[number] = (client, cost_tokens)
        self.num_tokens += cost_tokens
        entry.num_requests += 1
        entry.num_tokens += cost_tokens

    def share_of(self, client: str) -> tuple[int, int]:
        """How many requests, with how many tokens, of this client wait."""
        entry = self._clients.get(client)
        return (entry.num_requests, entry.num_tokens) if entry else (0, 0)

    def pop(self) -> int | None:
        """The next request's number; its client is charged for it."""
        chosen = self._next_client()
        if chosen is None:
            return None
        ticket = heapq.heappop(chosen.waiting)
        self._virtual_time = chosen.served_tokens
        chosen.served_tokens += ticket.cost_tokens
        self._forget(ticket.number)
        return ticket.number

    def peek(self) -> int | None:
        chosen = self._next_client()
        return chosen.waiting[0].number if chosen else None

    def remove(self, number: int) -> bool:
        """Takes a request out (it left, or expired). Returns whether it was here."""
        return self._forget(number)

    def _forget(self, number: int) -> bool:
        entry = self._live.pop(number, None)
        if entry is None:
            return False
        name, cost_tokens = entry
        self.num_tokens -= cost_tokens
        self._clients[name].num_requests -= 1
        self._clients[name].num_tokens -= cost_tokens
        return True

    def _next_client(self) -> _Client | None:
        best: _Client | None = None
        for name in list(self._clients):
            client = self._clients[name]
            while client.waiting and client.waiting[0].number not in self._live:
                heapq.heappop(client.waiting)
            if not client.waiting:
                if client.served_tokens <= self._virtual_time:
                    del self._clients[name]
                continue
            if best is None or self._order(client) < self._order(best):
                best = client
        return best

    @staticmethod
    def _order(client: _Client) -> tuple[int, float, int]:
        head = client.waiting[0]
        return head.negative_priority, client.served_tokens, head.number
