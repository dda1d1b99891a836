"""Guesses at a request's next tokens, which one step checks all at once: how many, and of which by prompt lookup.

A step computes the guesses behind the last known token, a token is sampled at each of them as ever, and those count
whose guess was right, so that no token is another than without. A draft network makes them, or the request's own text:
what stood behind the last few tokens where they stood before is likely to follow again (names, quotations, code, the
sentences of a text that is summarized). Knows ids and how often guesses held; neither the scheduler nor networks. Runs
in the worker process.

Source: speculative decoding (arXiv 2211.17192); of its forms, prompt lookup decoding (A. Saxena, 2023).
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SHORTEST_MATCH = 2
LONGEST_MATCH = 8
PRIOR_RIGHT, PRIOR_TRIED = 2.0, 3.0
"""What a request is taken to have had right before anything is known of it."""
MEMORY = 0.9
"""How much of what is known of its guesses counts in the next step."""


@dataclass(frozen=True, slots=True)
class Guess:
    """`token_ids` are guessed to follow; where the draft network is to say which, they are zeros."""

    token_ids: list[int] = field(default_factory=list)
    by_draft: bool = False
    """Whether the draft network makes them, or catches up to make some later."""


NOTHING = Guess()


class Record:
    """How often guesses at the tokens of one request held: `num_worthwhile` before a step, `learn` after it."""

    def __init__(self, usual: "Record | None" = None, *, memory: float = MEMORY) -> None:
        """`usual`: how those at all requests' held, which learns of this one's."""
        self._usual = usual
        self._memory = memory
        self._right = 0.0
        self._tried = 0.0

    @property
    def odds(self) -> float:
        """How likely a guess is right, if those before it are, by what is known."""
        usual = PRIOR_RIGHT / PRIOR_TRIED if self._usual is None else self._usual.odds
        return (self._right + PRIOR_TRIED * usual) / (self._tried + PRIOR_TRIED)

    def num_worthwhile(self, most: int, least_odds: float) -> int:
        """At most `most` guesses, and only as many as are all right with a probability of `least_odds`."""
        count = min(most, int(math.log(max(least_odds, 1e-9)) / math.log(self.odds)))
        if count > 0:
            return count
        self._right *= self._memory  # it will be tried again some time
        self._tried *= self._memory
        return 0

    def learn(self, new_ids: list[int], num_drafted: int) -> None:
        """`new_ids`: what a step has sampled, all but the last as drafted."""
        num_right = len(new_ids) - 1
        if not num_drafted:
            return
        self._right = self._right * self._memory + num_right
        self._tried = self._tried * self._memory + num_right + (num_right < num_drafted)
        if self._usual is not None:
            self._usual.learn(new_ids, num_drafted)


class Drafts(Record):
    """The guesses of one request from its own text: `draft` before a step, `learn` after it."""

    def __init__(self, ids: list[int]) -> None:
        """`ids`: what it has read and written so far."""
        super().__init__()
        self._ids = np.array(ids, np.int64)
        self._num_ids = len(ids)

    def draft(self, most: int, least_odds: float) -> list[int]:
        """As many ids as are worthwhile, if there are any to be guessed."""
        count = self.num_worthwhile(most, least_odds)
        return continuation(self._ids[: self._num_ids], count) if count else []

    def learn(self, new_ids: list[int], num_drafted: int) -> None:
        super().learn(new_ids, num_drafted)
        end = self._num_ids + len(new_ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(64, end), np.int64)])
        self._ids[self._num_ids : end] = new_ids
        self._num_ids = end


def continuation(ids: NDArray[np.int64], count: int) -> list[int]:
    """The `count` ids that followed where the last few stood before: behind the longest such place, the latest of
    equals; nothing if not even two ids stood there.

    Worked example: ids 7 1 2 3 9 1 2, count 4: 1 2 stood before 3 9 1 2, and that is what comes again.
    """
    last = len(ids) - 1
    places = np.flatnonzero(ids[:last] == ids[last])
    for length in range(1, LONGEST_MATCH):
        longer = places[places >= length]
        longer = longer[ids[longer - length] == ids[last - length]]
        if not len(longer):
            if length < SHORTEST_MATCH:
                return []
            break
        places = longer
    following = ids[places[-1] + 1 :]
    found: list[int] = np.resize(following, count).tolist()  # what is behind the end repeats, as it did once
    return found
