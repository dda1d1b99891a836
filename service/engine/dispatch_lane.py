"""What the dispatcher keeps of a checkpoint's requests: those that wait here, and those that the worker holds.

Pure data. Runs in the API process.
"""

from dataclasses import dataclass, field

from service.engine.fair_queue import FairQueue
from service.engine.flight import Flight
from service.engine.seats import Seats


@dataclass(slots=True)
class DispatchLane:
    """Of a checkpoint and the adapters that share it."""

    rows: Seats
    """Of the batch that generates."""
    texts: Seats
    """Of the batch of single-pass work, in tokens and in texts."""
    bulk_texts: Seats
    """The same for requests of more than a step, which take turns with the others and keep none of them waiting."""
    waiting: FairQueue = field(default_factory=FairQueue)
    bulk: FairQueue = field(default_factory=FairQueue)
    """Those waiting single-pass requests that are more than a step."""
    bulk_inside: set[int] = field(default_factory=set)
    flights: dict[int, Flight] = field(default_factory=dict)
    inside: dict[int, Flight] = field(default_factory=dict)
    single_pass_tokens: int = 0
    num_generating: int = 0
    num_passed_over: int = 0
    """Generating requests inside that the last step left out: for want of a row, of room or of a grammar."""
    unstarted: dict[int, int] = field(default_factory=dict)
    """Prompt tokens of the generating requests inside that have not been started there (for want of room, it seems;
    those that wait for their grammar are left out)."""
    unstarted_tokens: int = 0
    compiling: set[int] = field(default_factory=set)
    """Generating requests inside with a grammar that have not been started there: it is being compiled, it seems."""

    @property
    def queues(self) -> tuple[FairQueue, FairQueue]:
        return self.waiting, self.bulk

    @property
    def seats(self) -> tuple[Seats, ...]:
        return self.rows, self.texts, self.bulk_texts

    @property
    def num_queued(self) -> int:
        return len(self.waiting) + len(self.bulk)

    def leave_queue(self, number: int) -> None:
        for queue in self.queues:
            queue.remove(number)

    @property
    def num_waiting(self) -> int:
        """Accepted and in no batch, here or in the worker."""
        num_standing = self.texts.num_standing + self.bulk_texts.num_standing
        return self.num_queued + max(self.rows.num_standing, self.num_passed_over) + num_standing

    @property
    def num_waiting_tokens(self) -> int:
        num_standing = sum(seats.num_standing_tokens for seats in self.seats)
        return sum(queue.num_tokens for queue in self.queues) + num_standing

    def share_of(self, client: str) -> tuple[int, int]:
        """How many requests, with how many tokens, of this client wait."""
        shares = [queue.share_of(client) for queue in self.queues] + [seats.share_of(client) for seats in self.seats]
        return sum(num_requests for num_requests, _ in shares), sum(num_tokens for _, num_tokens in shares)
