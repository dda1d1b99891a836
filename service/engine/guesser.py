"""How many of a request's next tokens are guessed in a step, to be checked in it, and who guesses them.

As many as are worth their computation, by how often guesses held and by what they cost. They are read off the request's
own text, or left to a draft network, which is kept abreast of prompts and otherwise catches up when it is to guess.
Knows neither queues nor time. Runs in the worker process.
"""

from collections import deque
from collections.abc import Sequence as Several

from model.batch import Batch
from service.engine.draft_progress import DraftProgress
from service.engine.drafts import NOTHING, Drafts, Guess, Record
from service.engine.placement import Placement
from service.engine.rows import Step
from service.engine.sequence import Branch, Sequence
from service.engine.step_costs import StepCosts

CATCH_UP_TOKENS = 64
"""Known ids that the draft may compute, beside those that it has just been given, in a step in which all decode."""
STEPS_BETWEEN_TRIES = 256
"""Where a draft's guesses do not pay, one is made all the same after so many steps: things may have changed."""
LONG_MEMORY = 0.99
"""How much of what is known of all requests' guesses counts after those of one more."""
WINDOW = 32


class Guesser:
    def __init__(self, placement: Placement, costs: StepCosts, most: int, *, draft_len: int | None, watermark: int):
        """`most`: guesses for a request in a step; `draft_len`: the context of the draft network, None without one;
        `watermark`: blocks that guesses leave free."""
        self.most = most
        self.progress = None if draft_len is None else DraftProgress(placement.block_size, draft_len)
        self._placement = placement
        self._costs = costs
        self._watermark = watermark
        self._least_odds: float | None = None
        """How likely a guess must be right to be worth its computation in the step being made; None: none are made."""
        self._most_now = most
        self._usual = Record(memory=LONG_MEMORY)
        self._passes = deque[tuple[int, int, float]](maxlen=WINDOW)
        """What the draft has done of late: passes, their rows in all, and seconds."""
        self._num_idle = 0
        """Steps since a guess of the draft last paid or was tried."""

    def begin_step(self, step: Step, decoding: Several[Sequence]) -> None:
        """`decoding`: all that run, if they decode; none: guesses are not to be made."""
        self._least_odds, self._most_now = None, self.most
        draft_tokens = step.budget
        if self.most and decoding:
            self._least_odds = self._costs.least_odds(len(decoding))
            if self.progress is not None:
                self._weigh_passes(decoding, self._least_odds)
                draft_tokens = CATCH_UP_TOKENS + 2 * len(decoding)
        if self.progress is not None:
            step.draft_filled = self.progress.begin_step(draft_tokens)

    def _weigh_passes(self, decoding: Several[Sequence], row: float) -> None:
        """How many passes of the draft pay, each of which gives one guess more to all who want it: those whose guesses
        save more turns than they and the pass cost. `row`: what a row costs, in turns.

        Worked example: a row costs 0.1 turns among 4, whose step without its rows then takes 4 * (1 - 0.1) = 3.6, and
        the draft takes 0.2 of all that: 0.12 for each guess and 0.72 for a pass. With odds of 0.8, 0.5, 0.5 and 0.1 the
        first pass saves 0.68 + 0.38 + 0.38 turns and pays; the second, 0.52 + 0.13 + 0.13, just so; the third does not.
        """
        assert self.progress is not None
        share = self._costs.share_of(self._passes)
        guess = self._least_odds = row * (1.0 + share)
        depth, odds = 0, [(one.drafts or self._usual).odds for one in decoding if one.may_be_guessed]
        if not odds:
            return
        chances, price = odds, share * len(decoding) * (1.0 - row)
        while depth < self.most and sum([max(0.0, chance - guess) for chance in chances]) > price:
            chances = [chance * each for chance, each in zip(chances, odds, strict=True)]
            depth += 1
        self._num_idle = 0 if depth else self._num_idle + 1
        if self._num_idle > STEPS_BETWEEN_TRIES:  # and in the steps that follow, if the draft has yet to catch up
            self._least_odds, depth = 0.0, 1
        self._most_now = depth
        self.progress.follows_prompts = self._num_idle == 0

    def guess(self, step: Step, sequence: Sequence, branch: Branch) -> Guess:
        """Guesses at the tokens behind its next one, with the blocks for them; as many as are worth their computation,
        take no budget from others and leave blocks free, one at least for each row that has its turn later."""
        if self._least_odds is None or not sequence.may_be_guessed:
            return NOTHING
        reserve = max(self._watermark, step.reserved)
        most = min(
            self._most_now,
            sequence.max_output - len(branch.output_ids) - 1,
            step.budget - step.reserved - 1,
            self._placement.num_tokens_with_room(branch, reserve) - branch.num_tokens,
        )
        if self.progress is None:
            guess = self._from_text(sequence, branch, most, self._least_odds)
        else:
            guess = self._by_draft(sequence, branch, most, self._least_odds)
        self._placement.make_room(branch, branch.num_tokens + len(guess.token_ids))
        return guess

    @staticmethod
    def _from_text(sequence: Sequence, branch: Branch, most: int, least_odds: float) -> Guess:
        if sequence.drafts is None:
            sequence.drafts = Drafts([*sequence.encoder_ids, *branch.prompt_ids, *branch.output_ids])
        assert isinstance(sequence.drafts, Drafts)
        return Guess(sequence.drafts.draft(most, least_odds))

    def _by_draft(self, sequence: Sequence, branch: Branch, most: int, least_odds: float) -> Guess:
        assert self.progress is not None
        if sequence.drafts is None:
            sequence.drafts = Record(self._usual)
        most = min(most, self.progress.max_len - branch.num_computed)
        count = sequence.drafts.num_worthwhile(most, least_odds)
        if count == 0:
            return NOTHING
        return Guess([0] * count if self.progress.can_reach(branch, branch.num_tokens) else [], by_draft=True)

    def forget_step(self, step: Step) -> None:
        if self.progress is not None:
            self.progress.forget_step(step.draft_filled)

    def record(self, batch: Batch, seconds: float) -> None:
        """Learns from what the draft network took, in a step in which all decode; catching up is no measure."""
        rows = [row for row in batch.rows if row.num_drafted]
        num_tokens = sum([len(row.draft_ids) for row in batch.rows])
        if rows:
            self._num_idle = min(self._num_idle, 1)
        if rows and num_tokens <= 2 * len(rows):
            num_guesses = [row.num_drafted for row in rows]
            self._passes.append((max(num_guesses), sum(num_guesses) + num_tokens - len(rows), seconds))
