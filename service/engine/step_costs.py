"""What a step costs, learned from the steps before it: how many prompt tokens go beside rows that decode.

A step's seconds are taken for a sum: so much for each prompt token, for the step, and for each row that decodes. Knows
numbers of rows and tokens, and seconds that others have measured; neither requests nor a clock. Runs in the worker
process.
"""

from collections import deque
from collections.abc import Iterable
from statistics import median

import numpy as np

WINDOW = 32
ROUNDS = 8


class StepCosts:
    """`record` each step; `num_prompt_tokens` says how many make a step as long as requests bear it."""

    def __init__(self) -> None:
        self._recent = [deque[tuple[float, ...]](maxlen=WINDOW) for _ in range(2)]
        """Steps without prompts and with them: as many of each, however rare they are."""
        self._costs = np.zeros(3)
        """Seconds for each prompt token, for a step, and for each row that decodes."""
        self._fitted = True

    def record(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        counts = (num_prompt_tokens, 1, num_decoding)
        self._fitted = False
        self._recent[num_prompt_tokens > 0].append(tuple(count / seconds for count in counts))

    def num_prompt_tokens(self, num_decoding: int, num_here: int, stretch: float) -> int:
        """The prompt tokens beside `num_decoding` rows with which a step takes `stretch` times as long as one in which
        all `num_here` decode, as they soon will; 0 if costs are not known.

        Worked example: 4 rows decode in 10 ms, 16 in 20 ms, and a prompt token takes 0.5 ms. With 16 here and a stretch
        of 2.5 it is 80 tokens beside the 4, and the step takes 10 + 40 ms.
        """
        self._fit()
        per_prompt_token, per_step, per_row = self._costs.tolist()
        if per_prompt_token == 0.0:
            return 0
        usual, own = (per_step + per_row * count for count in (num_here, num_decoding))
        return int((stretch * usual - own) / per_prompt_token)

    def least_odds(self, num_decoding: int) -> float:
        """From which probability of being right a guess at a token is worth its computation beside `num_decoding` rows;
        0 if costs are not known, or if there are none.

        A guess costs what a row costs; one that is right saves its request a turn, and that is its share of a step.

        Worked example: with 10 ms for a step and 1 ms for each row a turn of one request alone takes 11 ms, and a guess
        pays from 1 / 11 on; among 10 a turn takes 2 ms for each, and it must be right every second time.
        """
        self._fit()
        _, per_step, per_row = self._costs.tolist()
        return per_row / (per_step / num_decoding + per_row) if per_row and num_decoding else 0.0

    def share_of(self, work: Iterable[tuple[int, int, float]]) -> float:
        """What another network takes of this one's time: in the middle of some (steps, rows that decode, seconds); 0 if
        costs are not known."""
        self._fit()
        _, per_step, per_row = self._costs.tolist()
        ours = [(per_step * num_steps + per_row * num_rows, seconds) for num_steps, num_rows, seconds in work]
        shares = [seconds / expected for expected, seconds in ours if expected > 0.0]
        return median(shares) if shares else 0.0

    def _fit(self) -> None:
        """Least squares of the relative error, so that a step that was held up weighs little; no cost below zero.

        One cost after the other is set to what suits best beside the others (coordinate descent), from what was known
        before: costs that the recent steps do not tell apart are not torn apart by noise.
        """
        if self._fitted:
            return
        self._fitted = True
        steps = np.array([*self._recent[0], *self._recent[1]]).reshape(-1, len(self._costs))
        products, sums = steps.T @ steps, steps.sum(axis=0)
        for _ in range(ROUNDS):
            for place in np.flatnonzero(products.diagonal()):
                change = (sums[place] - products[place] @ self._costs) / products[place, place]
                self._costs[place] = max(0.0, self._costs[place] + change)
