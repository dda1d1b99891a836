"""A draft network whose keys and values are the very prefixes that they stand for, for the scheduler's fake runner."""

from collections.abc import Callable

from model.batch import Row


class FakeDraft:
    """Fills in the guesses of a batch, and checks that every slot that one hangs on holds the right prefix."""

    def __init__(self, block_size: int, max_len: int, guess: Callable[[Row, list[int]], int]) -> None:
        """`guess` says what is guessed for a row behind the ids known and guessed so far."""
        self.block_size = block_size
        self.max_len = max_len
        self.guess = guess
        self.memory: dict[int, tuple[int, ...]] = {}
        self.num_computed = 0
        """Positions, guesses included."""

    def run(self, rows: list[Row], *, fails: bool) -> None:
        followed = [row for row in rows if row.draft_ids]
        for row in followed:
            known = row.prompt_ids + row.output_ids
            end = row.draft_start + len(row.draft_ids)
            assert row.draft_ids == known[row.draft_start : end]
            assert end <= row.start + len(row.token_ids) - row.num_drafted
            for position in range(row.draft_start, end):
                self._store(row, position, known)
        if fails:
            for row in followed:
                for position in range(row.draft_start, row.draft_start + len(row.draft_ids)):
                    self.memory[self._slot(row, position)] = (-1,)
            return
        for row in followed:
            known = row.prompt_ids + row.output_ids
            for position in range(row.draft_start + len(row.draft_ids)):
                self._check(row, position, known)
        for row in followed:
            if row.num_drafted:
                self._guess(row)

    def _guess(self, row: Row) -> None:
        known = row.prompt_ids + row.output_ids
        first = len(row.token_ids) - row.num_drafted
        assert row.token_ids[first:] == [0] * row.num_drafted, "somebody else has guessed"
        assert row.draft_start + len(row.draft_ids) == len(known), "guesses behind what is not computed"
        for place in range(first, len(row.token_ids)):
            if place > first:
                self._store(row, len(known) - 1, known)
            row.token_ids[place] = self.guess(row, known)
            known = [*known, row.token_ids[place]]

    def _store(self, row: Row, position: int, known: list[int]) -> None:
        assert position < self.max_len, "past the draft's context"
        self.memory[self._slot(row, position)] = tuple(known[: position + 1])
        self.num_computed += 1

    def _check(self, row: Row, position: int, known: list[int]) -> None:
        held = self.memory.get(self._slot(row, position))
        assert held == tuple(known[: position + 1]), f"the draft's position {position} holds {held}"

    def _slot(self, row: Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size
