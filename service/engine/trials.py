"""After a step that failed: the requests that were in it, run apart from the others until the culprit is alone.

A step's exception does not say whose fault it is. Its requests are halved into groups, each group runs by itself; one
that fails again is halved again, and a request that fails alone is the culprit. Those that come through go back to the
common queue. Knows nothing of blocks or budgets. Runs in the worker process.
"""

from service.engine.sequence import Sequence
from service.engine.waiting import WaitingQueue


class Trials:
    def __init__(self) -> None:
        self._groups: list[WaitingQueue] = []
        self._too_many_tokens = 0
        self._convicted = False

    @property
    def active(self) -> WaitingQueue | None:
        """The queue of the group being tried; None in ordinary times."""
        return self._groups[-1] if self._groups else None

    @property
    def has_waiting(self) -> bool:
        return any(group.head() is not None for group in self._groups)

    def begin(self, suspects: list[Sequence], too_many_tokens: int = 0) -> None:
        """Queues the requests of a failed step in two halves, to be tried before whatever is still on trial.

        `too_many_tokens`: the step's, where there was no memory for it.
        """
        if not self._groups:
            self._too_many_tokens, self._convicted = too_many_tokens, False
        half = len(suspects) // 2
        for group in (suspects[half:], suspects[:half]):
            if group:
                queue = WaitingQueue()
                for sequence in group:
                    queue.push(sequence)
                self._groups.append(queue)

    def convict(self) -> None:
        """A request has failed alone."""
        self._convicted = True

    def close_empty(self) -> int:
        """Ends the trials of groups without anybody left; called while nothing runs.

        Returns how many tokens were too many, once all have come through apart from each other; else 0.
        """
        while self._groups and self._groups[-1].head() is None:
            self._groups.pop()
        if self._groups or self._convicted:
            return 0
        found, self._too_many_tokens = self._too_many_tokens, 0
        return found
