"""How many of a request's next tokens are guessed in a step, to be checked in it, and who guesses them.

As many as are worth their computation, by how often guesses held and by what they cost. They are read off the request's
own text, or left to a draft network, which is kept abreast of prompts and otherwise catches up when it is to guess.
Knows neither queues nor time. Runs in the worker process.
"""

from model.batch import Batch
from service.engine.draft_progress import DraftProgress
from service.engine.drafts import NOTHING, Drafts, Guess, Record
from service.engine.placement import Placement
from service.engine.rows import Step
from service.engine.sequence import Branch, Sequence
from service.engine.step_costs import StepCosts

CATCH_UP_TOKENS = 64
"""Known ids that the draft may compute, beside those that it has just been given, in a step in which all decode."""
STEPS_BETWEEN_TRIES = 64
"""Where a draft's guesses do not pay, one is tried after so many steps: what they cost may have changed."""


class Guesser:
    def __init__(self, placement: Placement, costs: StepCosts, most: int, *, draft_len: int | None, watermark: int):
        """`most`: guesses for a request in a step; `draft_len`: the context of the draft network, None without one;
        `watermark`: blocks that guesses leave free."""
        self.most = most
        self.progress = None if draft_len is None else DraftProgress(placement.block_size, draft_len)
        self._placement = placement
        self._costs = costs
        self._draft_costs = StepCosts()
        """What it costs to guess: a pass of the draft network is a step."""
        self._watermark = watermark
        self._least_odds: float | None = None
        """How likely a guess must be right to be worth its computation in the step being made; None: none are made."""
        self._most_now = most
        self._num_idle = 0

    def begin_step(self, step: Step, num_decoding: int) -> None:
        """`num_decoding`: how many requests decode, all that run; 0: guesses are not to be made."""
        self._least_odds, self._most_now = None, self.most
        draft_tokens = step.budget
        if self.most and num_decoding:
            self._least_odds = self._costs.least_odds(num_decoding, self._draft_costs)
            draft_tokens = CATCH_UP_TOKENS + 2 * num_decoding
            self._try_again()
        if self.progress is not None:
            step.draft_filled = self.progress.begin_step(draft_tokens)

    def _try_again(self) -> None:
        """Where guesses of the draft do not pay, one does now and then."""
        pays = self._least_odds is not None and self._least_odds < 1.0
        self._num_idle = 0 if pays else self._num_idle + 1
        if self._num_idle > STEPS_BETWEEN_TRIES:
            self._least_odds, self._most_now, self._num_idle = 0.0, 1, 0

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
            guess = self._from_text(sequence, branch, most)
        else:
            guess = self._by_draft(sequence, branch, min(most, self.progress.max_len - branch.num_computed))
        self._placement.make_room(branch, branch.num_tokens + len(guess.token_ids))
        return guess

    def _from_text(self, sequence: Sequence, branch: Branch, most: int) -> Guess:
        assert self._least_odds is not None
        if sequence.drafts is None:
            sequence.drafts = Drafts([*sequence.encoder_ids, *branch.prompt_ids, *branch.output_ids])
        assert isinstance(sequence.drafts, Drafts)
        return Guess(sequence.drafts.draft(most, self._least_odds))

    def _by_draft(self, sequence: Sequence, branch: Branch, most: int) -> Guess:
        assert self._least_odds is not None
        assert self.progress is not None
        if sequence.drafts is None:
            sequence.drafts = Record()
        count = sequence.drafts.num_worthwhile(most, self._least_odds)
        if count == 0:
            return NOTHING
        return Guess([0] * count if self.progress.can_reach(branch, branch.num_tokens) else [], by_draft=True)

    def forget_step(self, step: Step) -> None:
        if self.progress is not None:
            self.progress.forget_step(step.draft_filled)

    def record(self, batch: Batch, seconds: float) -> None:
        """Learns from what the draft network took for guesses."""
        rows = [row for row in batch.rows if row.draft_ids]
        if rows:
            num_guesses = sum([row.num_drafted for row in rows])
            num_known = sum([len(row.draft_ids) - (row.num_drafted > 0) for row in rows])
            num_passes = max([1, *(row.num_drafted for row in rows)])
            self._draft_costs.record(num_guesses, num_known, seconds, num_steps=num_passes)
