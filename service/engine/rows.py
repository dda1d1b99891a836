"""What of a request is computed in a step: the rows that it adds to the batch.

Knows placed sequences and a number of tokens to spend; nothing of queues, order or memory. Runs in the worker process.
"""

from dataclasses import dataclass, field

from model.batch import Batch, Row
from service.engine.draft_progress import DraftProgress
from service.engine.drafts import Guess
from service.engine.placement import Placement
from service.engine.sequence import Branch, Sequence


@dataclass(slots=True)
class Step:
    """A step being made, and once made one whose results are awaited."""

    batch: Batch = field(default_factory=lambda: Batch(rows=[]))
    entries: list[tuple[Sequence, Branch]] = field(default_factory=list)
    """Who each row of the batch belongs to."""
    budget: int = 0
    reserved: int = 0
    """Tokens of the budget kept for running requests that have not had their turn: one for each of their rows."""
    num_preempted: int = 0
    filled: list[int] = field(default_factory=list)
    """Blocks that it fills and that can be found by their content."""
    draft_filled: list[int] = field(default_factory=list)
    """Blocks that the draft network fills in it."""

    def group_by_adapter(self) -> None:
        """Puts rows with the same adapter side by side, each group's in the order that they had."""
        rows = self.batch.rows
        if len(rows) < 2 or all(sequence.adapter is None for sequence, _ in self.entries):
            return
        order = sorted(range(len(rows)), key=lambda place: rows[place].adapter or 0)
        self.batch.rows = [rows[place] for place in order]
        self.entries = [self.entries[place] for place in order]


class RowMaker:
    def __init__(self, placement: Placement, prefill_chunk: int, progress: DraftProgress | None = None) -> None:
        """`prefill_chunk`: tokens of one row per step at the most; `progress`: the draft network's, where there is one,
        which follows what it may have to guess behind."""
        self._placement = placement
        self._prefill_chunk = prefill_chunk
        self._progress = progress

    def add_next(self, step: Step, sequence: Sequence, branch: Branch, guess: Guess) -> None:
        """Adds one token more, and those guessed to follow it, in blocks that the branch has."""
        self._add_row(step, sequence, branch, 1)
        row, guessed = step.batch.rows[-1], guess.token_ids
        if guessed:
            row.token_ids += guessed
            row.num_drafted = len(guessed)
            step.budget -= len(guessed)
        if self._progress is not None:
            self._progress.add(row, branch, follows=guess.by_draft)

    def add(self, step: Step, sequence: Sequence, available: int) -> None:
        """Adds its rows to the batch, with at most `available` tokens, the source's included."""
        branches = sequence.branches
        encode = bool(sequence.encoder_ids) and not sequence.encoded
        if encode:
            sequence.encoded = True
            self._placement.fill_source(sequence)
            available -= len(sequence.encoder_ids)
            step.budget -= len(sequence.encoder_ids)
        share = min(self._prefill_chunk, available // len(branches))
        # Branches sample together: none takes its last token before all can.
        complete = max([self._gap(sequence, branch) for branch in branches]) <= share
        for branch in branches:
            # Looked at once more: the branch before may fill, in this step, what this one needs.
            gap = self._gap(sequence, branch)
            length = min(gap, share) if complete else min(gap - 1, share)
            if length > 0:
                self._add_row(step, sequence, branch, length, encode=encode)
                encode = False
                if self._progress is not None:
                    follows = self._progress.follows_prompts and sequence.may_be_guessed
                    self._progress.add(step.batch.rows[-1], branch, follows=follows)
        assert not encode

    def _gap(self, sequence: Sequence, branch: Branch) -> int:
        """Tokens to compute, after what other rows have computed in the meantime."""
        gap = branch.num_tokens - branch.num_computed
        if gap > 1:
            skipped = self._placement.catch_up(sequence, branch)
            gap -= skipped
            if not sequence.delivered:
                sequence.num_cached_tokens = min(sequence.num_cached_tokens + skipped, len(sequence.prompt_ids))
        return gap

    def _add_row(self, step: Step, sequence: Sequence, branch: Branch, length: int, *, encode: bool = False) -> None:
        start = branch.num_computed
        end = start + length
        size = self._placement.block_size
        prompt_ids, output_ids = branch.prompt_ids, branch.output_ids
        samples = end == branch.num_tokens
        fed = branch.num_pending > 0
        # What holds a token that nobody knows yet is told by `fill_late`.
        if start // size < end // size and not fed:
            self._placement.fill(branch, start, end)
        branch.num_computed = end
        branch.num_pending += samples
        if fed:
            token_ids = [0]
        else:
            token_ids = [output_ids[-1]] if samples and length == 1 and output_ids else branch.tokens(start, end)
        step.batch.rows.append(
            Row(
                branch.row_id,
                token_ids,
                start,
                branch.block_ids,
                sequence.sampling,
                samples,
                output_ids,
                prompt_ids,
                sequence.cross_block_ids,
                sequence.encoder_ids,
                encode,
                fed,
                sequence.adapter,
            )
        )
        step.entries.append((sequence, branch))
        step.budget -= length
