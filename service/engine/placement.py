"""Where the keys and values of sequences go: blocks for a sequence that is admitted, grows, forks or gives way.

Knows the block manager and sequences; nothing of budgets, queues or time. A sequence is placed with the blocks of all
its known tokens at once, so that a long prompt once begun never stops halfway for memory; afterwards it grows block by
block. Runs in the worker process.
"""

from array import array

from model.block_manager import BlockManager, chain_link, chain_root
from service.engine.sequence import Branch, Sequence


class Placement:
    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.block_size = blocks.block_size
        self.capacity = blocks.num_free
        """Blocks that sequences may hold; whoever reserves a block for itself does so before."""
        self._filled: list[int] = []

    def max_blocks(self, sequence: Sequence, max_tokens: int) -> int:
        """The most blocks it can come to hold with `max_tokens` known tokens; the last of them is never written."""
        own = self.blocks.num_blocks_for(max(len(sequence.prompt_ids), max_tokens - 1))
        return sequence.width * own + self.blocks.num_blocks_for(len(sequence.encoder_ids))

    def begin_step(self) -> list[int]:
        """Where the blocks that the step being made fills, and that can be found from now on, are noted."""
        self._filled = []
        return self._filled

    def forget_step(self, filled: list[int]) -> None:
        """The step failed: what it should have filled is not to be found any more."""
        self.blocks.forget(filled)
        filled.clear()

    def forget(self, sequence: Sequence) -> None:
        """The sequence computed rubbish: nobody else shall find it."""
        for branch in sequence.branches:
            self.blocks.forget(branch.block_ids)
        self.blocks.forget(sequence.cross_block_ids)

    # --- coming and going

    def has_source(self, sequence: Sequence) -> bool:
        """Whether the whole encoded source is in the cache, so that no encoder pass is needed."""
        chain = self._cross_chain(sequence)
        return bool(chain) and len(self.blocks.find_prefix(chain)) == len(chain)

    def place(self, sequence: Sequence, reserve: int) -> bool:
        """Gives it the blocks of all its known tokens, as many as possible shared from the cache, and leaves
        `reserve` blocks free; False (and nothing changed) if there are not so many."""
        cross = self._find_source(sequence)
        found = [self._find(sequence, branch) for branch in sequence.branches]
        num_needed = 0 if cross else self.blocks.num_blocks_for(len(sequence.encoder_ids))
        for branch, hits in zip(sequence.branches, found, strict=True):
            num_needed += self.blocks.num_blocks_for(branch.num_tokens) - len(hits)
        for hits in (cross, *found):
            self.blocks.share(hits)
        if num_needed + reserve > self.blocks.num_free:
            for hits in (cross, *found):
                self.blocks.release(hits)
            return False
        for branch, hits in zip(sequence.branches, found, strict=True):
            missing = self.blocks.num_blocks_for(branch.num_tokens) - len(hits)
            branch.block_ids = hits + self.blocks.allocate(missing)
            branch.num_computed = len(hits) * self.block_size
        sequence.cross_block_ids = cross or self.blocks.allocate(self.blocks.num_blocks_for(len(sequence.encoder_ids)))
        sequence.encoded = bool(cross)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Frees all its blocks; what is known of it stays, to be computed again."""
        for branch in sequence.branches:
            self.blocks.release(branch.block_ids)
            branch.block_ids = []
            branch.num_computed = 0
            branch.num_pending = 0
            branch.num_drafted = 0
            branch.fork_of = None
        self.blocks.release(sequence.cross_block_ids)
        sequence.cross_block_ids = []

    # --- a step

    def branch(self, sequence: Sequence, rows: list[tuple[int, int, int]]) -> None:
        """Exchanges its branches for the next ones of a beam search: (branch that it continues, token id, row id).

        A parent's first child goes on with its blocks; the other children are forks of that one, made when the next
        step is, and a childless parent's blocks are free at once.
        """
        parents, sequence.branches = sequence.branches, []
        heirs: dict[int, Branch] = {}
        for index, token_id, row_id in rows:
            parent = parents[index]
            child = Branch(row_id, parent.prompt_ids, [*parent.output_ids, token_id], parent.root)
            child.chain = parent.chain.copy()
            child.num_computed = parent.num_computed
            heir = heirs.setdefault(index, child)
            if heir is child:
                child.block_ids, parent.block_ids = parent.block_ids, []
            else:
                child.fork_of = heir
            sequence.branches.append(child)
        for parent in parents:
            self.blocks.release(parent.block_ids)

    def num_blocks_to_step(self, sequence: Sequence) -> int:
        """Free blocks that its next step needs: forked parts, and room for a token past the last block."""
        size = self.block_size
        count = 0
        for branch in sequence.branches:
            if branch.fork_of is not None or branch.num_computed == len(branch.block_ids) * size:
                count += 1
        return count

    def prepare_step(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Takes what `num_blocks_to_step` counted; returns the block copies to make before the step."""
        copies: list[tuple[int, int]] = []
        for branch in sequence.branches:
            if branch.fork_of is not None:
                branch.block_ids, new_copies = self.blocks.fork(branch.fork_of.block_ids, branch.num_computed)
                branch.fork_of = None
                copies += new_copies
        for branch in sequence.branches:
            if branch.num_computed == len(branch.block_ids) * self.block_size:
                branch.block_ids += self.blocks.allocate(1)
        return copies

    def num_tokens_with_room(self, branch: Branch, reserve: int) -> int:
        """How many of its tokens, known or guessed, there is room for without taking one of `reserve` free blocks."""
        return (len(branch.block_ids) + max(0, self.blocks.num_free - reserve)) * self.block_size

    def make_room(self, branch: Branch, num_tokens: int) -> None:
        missing = self.blocks.num_blocks_for(num_tokens) - len(branch.block_ids)
        if missing > 0:
            branch.block_ids += self.blocks.allocate(missing)

    def give_back_room(self, branch: Branch) -> None:
        """Frees the blocks behind what is computed: only wrong guesses lie there."""
        num_used = self.blocks.num_blocks_for(branch.num_computed)
        if num_used < len(branch.block_ids):
            self.blocks.release(branch.block_ids[num_used:])
            del branch.block_ids[num_used:]

    def fill(self, branch: Branch, start: int, end: int) -> None:
        """Registers the blocks that computing positions start .. end - 1 makes full."""
        if not self.blocks.prefix_caching:
            return
        size = self.block_size
        self._extend_chain(branch, end // size)
        for index in range(start // size, end // size):
            block = branch.block_ids[index]
            if self.blocks.register(block, branch.chain[index]):
                self._filled.append(block)

    def fill_late(self, branch: Branch) -> None:
        """Its last known id has just come to be known: registers the block that the id completes, if the step that
        computes it is made already."""
        num_known = branch.num_tokens - branch.num_pending
        if branch.num_computed >= num_known and num_known % self.block_size == 0:
            self.fill(branch, num_known - 1, num_known)

    def fill_source(self, sequence: Sequence) -> None:
        """Registers the cross-attention blocks that this step's encoder pass fills."""
        for block, digest in zip(sequence.cross_block_ids, self._cross_chain(sequence), strict=False):
            if self.blocks.register(block, digest):
                self._filled.append(block)

    def catch_up(self, sequence: Sequence, branch: Branch) -> int:
        """Takes over blocks that another row has filled since it was placed (the same prompt, some chunks ahead).

        Returns the number of tokens that need not be computed any more.
        """
        size = self.block_size
        if branch.num_computed % size:
            return 0
        first = index = branch.num_computed // size
        num_usable = self._num_usable(sequence, branch)
        while index < min(num_usable, len(branch.chain)):
            block = self.blocks.find(branch.chain[index])
            if block is None:
                break
            self.blocks.share([block])
            self.blocks.release([branch.block_ids[index]])
            branch.block_ids[index] = block
            index += 1
        branch.num_computed = index * size
        return (index - first) * size

    # --- digests

    def _num_usable(self, sequence: Sequence, branch: Branch) -> int:
        """How many leading blocks may come from the cache: the last known token is computed anew, for its logits."""
        limit = branch.num_tokens - 1
        if sequence.max_cached_tokens is not None:
            limit = min(limit, sequence.max_cached_tokens)
        return limit // self.block_size

    def _find(self, sequence: Sequence, branch: Branch) -> list[int]:
        num_usable = self._num_usable(sequence, branch)
        if num_usable == 0 or not self.blocks.prefix_caching:
            return []
        self._extend_chain(branch, branch.num_tokens // self.block_size)
        return self.blocks.find_prefix(branch.chain[:num_usable])

    def _extend_chain(self, branch: Branch, num_full: int) -> None:
        chain, size = branch.chain, self.block_size
        for index in range(len(chain), num_full):
            parent = chain[-1] if chain else branch.root
            chain.append(chain_link(parent, branch.tokens(index * size, (index + 1) * size)))

    def _find_source(self, sequence: Sequence) -> list[int]:
        """The cross-attention blocks of its source if all are cached; an encoder's output has no usable part."""
        chain = self._cross_chain(sequence)
        found = self.blocks.find_prefix(chain)
        return found if len(found) == len(chain) else []

    def _cross_chain(self, sequence: Sequence) -> list[bytes]:
        if not sequence.encoder_ids or not self.blocks.prefix_caching:
            return []
        if not sequence.cross_chain:
            source = chain_root("source", sequence.cache_salt, array("I", sequence.encoder_ids).tobytes())
            count = self.blocks.num_blocks_for(len(sequence.encoder_ids))
            sequence.cross_chain = [chain_link(source, [index]) for index in range(count)]
        return sequence.cross_chain

    @staticmethod
    def root(sequence: Sequence) -> bytes:
        """Where its digest chains start: keys and values depend on the salt's tenant, on the encoded source and on the
        adapter, too."""
        adapter = "" if sequence.adapter is None else str(sequence.adapter)
        return chain_root("tokens", sequence.cache_salt, array("I", sequence.encoder_ids).tobytes(), adapter)
