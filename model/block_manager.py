"""Which block of the KV cache belongs to whom: allocation, sharing by content, eviction of what nobody holds.

A block is an index; the tensors behind it are in `model.kv_cache`. This file knows neither sequences nor requests nor
time: a holder is a list of block ids and a chain of digests. Runs in the worker process, in its one thread; every
operation costs O(1) for each block that it is given.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def chain_root(*parts: str | bytes) -> bytes:
    """The digest that a chain starts from: whatever else than the tokens decides a block's content (salt, source)."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def chain_link(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block: its token ids after everything before them.

    128 bits of BLAKE2b stand for the content itself: two prefixes with one digest are not to be met in practice.
    """
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class BlockManager:
    """Reference counts, the index from content to block, and two pools of free blocks: blank, and cached but idle.

    An idle block keeps its content until it is needed for something else; the one idle for longest goes first, and of
    blocks released together the last of the sequence goes first, so that what remains is still a prefix.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; cached content in them does not count as use."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their content, held or idle."""
        return len(self._blocks)

    @property
    def usage(self) -> float:
        return 1.0 - self.num_free / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks for the caller alone; there must be that many free ones."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._drop_digest(block)
        self._references[block] = 1
        return block

    def share(self, block_ids: Iterable[int]) -> None:
        """Counts one more holder of blocks that are held already, or that are idle in the cache."""
        references = self._references
        for block in block_ids:
            if references[block] == 0:
                del self._idle[block]
            references[block] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Counts one holder less; a block without holders is free, and stays findable if it is registered."""
        references = self._references
        for block in reversed(block_ids):
            references[block] -= 1
            if references[block] == 0:
                if self._digests[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None
            assert references[block] >= 0, f"block {block} was released more often than taken"

    def fork(self, block_ids: Sequence[int], num_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
        """A second holder of the first `num_tokens` tokens that will write on: full blocks shared, a part copied.

        Returns the new block ids and the copies (source, target) to make before anything else is written. Worked
        example, blocks of 4: forking [7, 2, 5] at 6 tokens shares 7, takes a new block 9 and asks for the copy (2, 9).
        """
        num_full = num_tokens // self.block_size
        child = list(block_ids[:num_full])
        self.share(child)
        if num_tokens % self.block_size == 0:
            return child, []
        target = self.allocate(1)[0]
        child.append(target)
        return child, [(block_ids[num_full], target)]

    def find(self, digest: bytes) -> int | None:
        return self._blocks.get(digest)

    def find_prefix(self, chain: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `chain`; they are not held until `share` is called."""
        found: list[int] = []
        get = self._blocks.get
        for digest in chain:
            block = get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, block: int, digest: bytes) -> bool:
        """Makes a held block findable. Called when the step that fills it is scheduled, so that rows of that very step
        may share it: keys and values are written for all rows of a layer before its attention reads.

        The first block with a content keeps it: False if another one is registered already, or caching is off.
        """
        assert self._references[block] > 0
        if not self.prefix_caching or digest in self._blocks or self._digests[block] is not None:
            return False
        self._blocks[digest] = block
        self._digests[block] = digest
        return True

    def forget(self, block_ids: Iterable[int]) -> None:
        """Makes blocks unfindable, because the step that should have filled them failed; who holds them keeps them."""
        for block in block_ids:
            if self._digests[block] is None:
                continue
            self._drop_digest(block)
            if self._references[block] == 0:
                del self._idle[block]
                self._blank.append(block)

    def _drop_digest(self, block: int) -> None:
        digest = self._digests[block]
        assert digest is not None
        del self._blocks[digest]
        self._digests[block] = None

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Asserts that the books are consistent, and that exactly the block lists `held` are held. For tests."""
        expected = [0] * self.num_blocks
        for block_ids in held:
            for block in block_ids:
                expected[block] += 1
        assert expected == self._references
        free = sorted([*self._blank, *self._idle])
        assert free == [block for block, count in enumerate(expected) if count == 0]
        registered = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert registered == self._blocks
        assert all(self._digests[block] is not None for block in self._idle)
        assert all(self._digests[block] is None for block in self._blank)
