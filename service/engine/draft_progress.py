"""How far the draft network has come behind the large one: in each request, and in the blocks that requests share.

Its keys and values lie in blocks of the same ids, but need not be wherever the large network's are: it computes what
its guesses need, when they need it. Knows rows, branches and blocks; neither how much is guessed nor networks. Runs in
the worker process.
"""

from model.batch import Row
from service.engine.sequence import Branch


class DraftProgress:
    def __init__(self, block_size: int, max_len: int) -> None:
        """`max_len`: the draft's context."""
        self.max_len = max_len
        self._block_size = block_size
        self._whole: set[int] = set()
        """Blocks of which it has all tokens."""
        self._filled: list[int] = []
        self._budget = 0
        self.follows_prompts = True
        """Whether the draft computes prompts beside the large network."""

    def begin_step(self, max_tokens: int) -> list[int]:
        """`max_tokens`: how many known ids the draft may compute. Gives where the blocks that it fills are noted."""
        self._budget = max_tokens
        self._filled = []
        return self._filled

    def forget_step(self, filled: list[int]) -> None:
        """The step failed: what the draft should have filled is not relied on."""
        self._whole.difference_update(filled)

    def can_reach(self, branch: Branch, end: int) -> bool:
        """Whether the step has tokens left for all that the draft lacks before `end`."""
        return end - self._position(branch, branch.num_computed) <= self._budget

    def add(self, row: Row, branch: Branch, *, follows: bool) -> None:
        """Takes note of a row that is in the step; if the draft `follows` it, that computes of the known ids what it
        lacks, as far as its tokens go, and behind them the guesses, of which it need not compute the last."""
        size = self._block_size
        end = row.start + len(row.token_ids)
        # What the draft has where the large network writes is of other tokens, of wrong guesses for one.
        self._whole.difference_update(branch.block_ids[row.start // size : -(-end // size)])
        branch.num_drafted = min(branch.num_drafted, row.start)
        if not follows:
            return
        start = self._position(branch, row.start)
        stop = max(start, min(end - row.num_drafted, start + self._budget, self.max_len))
        self._budget -= stop - start
        row.draft_start, row.draft_ids = start, branch.tokens(start, stop)
        branch.num_drafted = stop + max(0, row.num_drafted - 1)
        filled = branch.block_ids[start // size : branch.num_drafted // size]
        self._whole.update(filled)
        self._filled += filled

    def _position(self, branch: Branch, num_computed: int) -> int:
        """The first position that the draft lacks; blocks that it has computed for other requests it has.

        Worked example, blocks of 4: 8 positions are computed, all found in the cache. The draft has the first block: 4.
        """
        size = self._block_size
        position = min(branch.num_drafted, num_computed)
        while position % size == 0 and position + size <= num_computed:
            if branch.block_ids[position // size] not in self._whole:
                break
            position += size
        branch.num_drafted = position
        return position
