"""The block manager's laws: examples, and random histories against a plain model of what each block holds."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model.block_manager import BlockManager, chain_link, chain_root

NUM_HISTORIES = int(os.environ.get("HISTORIES", "100"))


def chain_of(blocks: list[list[int]], salt: str = "") -> list[bytes]:
    chain, parent = [], chain_root(salt)
    for tokens in blocks:
        parent = chain_link(parent, tokens)
        chain.append(parent)
    return chain


def test_a_released_prefix_is_found_and_shared() -> None:
    manager = BlockManager(4, 2)
    chain = chain_of([[1, 2], [3, 4]])
    blocks = manager.allocate(2)
    assert all(manager.register(block, digest) for block, digest in zip(blocks, chain, strict=True))
    manager.release(blocks)
    assert manager.num_free == 4
    assert manager.find_prefix(chain) == blocks
    assert manager.find_prefix([*chain, chain_link(chain[-1], [5, 6])]) == blocks
    manager.share(blocks)
    manager.share(blocks)
    assert manager.num_free == 2
    manager.release(blocks)
    assert manager.num_free == 2
    manager.check([blocks])


def test_equal_tokens_after_different_pasts_are_different_content() -> None:
    assert chain_of([[1, 2], [3, 4]])[1] != chain_of([[5, 6], [3, 4]])[1]
    assert chain_of([[1, 2]])[0] != chain_of([[1, 2]], "tenant")[0]
    assert chain_root("ab", "c") != chain_root("a", "bc")


def test_blank_blocks_go_before_cached_ones_and_then_the_longest_idle() -> None:
    manager = BlockManager(3, 1)
    first, second = manager.allocate(2)
    chain = chain_of([[1], [2]])
    manager.register(first, chain[0])
    manager.register(second, chain[1])
    manager.release([second])
    manager.release([first])
    blank = manager.allocate(1)
    assert blank not in ([first], [second])
    assert manager.allocate(1) == [second]
    assert manager.find(chain[1]) is None
    assert manager.find(chain[0]) == first


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    manager = BlockManager(3, 1)
    chain = chain_of([[1], [2], [3]])
    blocks = manager.allocate(3)
    for block, digest in zip(blocks, chain, strict=True):
        manager.register(block, digest)
    manager.release(blocks)
    manager.allocate(1)
    assert manager.find_prefix(chain) == blocks[:2]


def test_the_first_block_with_a_content_keeps_it() -> None:
    manager = BlockManager(2, 1)
    [digest] = chain_of([[1]])
    first, second = manager.allocate(2)
    assert manager.register(first, digest)
    assert not manager.register(second, digest)
    manager.release([second])
    assert manager.find(digest) == first


def test_a_fork_shares_full_blocks_and_copies_the_part() -> None:
    manager = BlockManager(8, 4)
    parent = manager.allocate(3)
    child, copies = manager.fork(parent, 6)
    assert child[:1] == parent[:1]
    assert child[1] not in parent
    assert copies == [(parent[1], child[1])]
    whole, none = manager.fork(parent, 8)
    assert whole == parent[:2]
    assert none == []
    manager.check([parent, child, whole])


def test_forgotten_blocks_are_not_found_and_stay_with_their_holders() -> None:
    manager = BlockManager(2, 1)
    chain = chain_of([[1], [2]])
    held, idle = manager.allocate(2)
    manager.register(held, chain[0])
    manager.register(idle, chain[1])
    manager.release([idle])
    manager.forget([held, idle])
    assert manager.find_prefix(chain) == []
    assert manager.find(chain[1]) is None
    manager.check([[held]])


def test_usage_counts_held_blocks_alone() -> None:
    manager = BlockManager(4, 1)
    blocks = manager.allocate(2)
    manager.register(blocks[0], chain_of([[1]])[0])
    assert manager.usage == 0.5
    manager.release(blocks)
    assert manager.usage == 0.0


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(1, 1, prefix_caching=False)
    [digest] = chain_of([[1]])
    assert not manager.register(manager.allocate(1)[0], digest)
    assert manager.find(digest) is None


class History(RuleBasedStateMachine):
    """Holders with token lists; `content` is what the model of the cache says about each block."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.holders: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(length=st.integers(1, 12), letter=st.integers(0, 1))
    def take(self, length: int, letter: int) -> None:
        size = self.manager.block_size
        tokens = [(position // 4) * letter for position in range(length)]
        parts = [tokens[start : start + size] for start in range(0, length - length % size, size)]
        chain = chain_of(parts)
        found = self.manager.find_prefix(chain)
        for index, block in enumerate(found):
            assert self.content[block] == tuple(tokens[: (index + 1) * size])
        self.manager.share(found)
        missing = self.manager.num_blocks_for(length) - len(found)
        if missing > self.manager.num_free:
            self.manager.release(found)
            return
        blocks = found + self.manager.allocate(missing)
        for index in range(len(found), len(chain)):
            self.manager.register(blocks[index], chain[index])
        for index in range(len(found), len(blocks)):
            self.content[blocks[index]] = tuple(tokens[: (index + 1) * size])
        self.holders.append((blocks, tokens))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks, _ = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.manager.release(blocks)

    @precondition(lambda self: self.holders and self.manager.num_free)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        blocks, tokens = data.draw(st.sampled_from(self.holders))
        length = data.draw(st.integers(1, len(tokens)))
        child, copies = self.manager.fork(blocks, length)
        for source, target in copies:
            self.content[target] = self.content[source]
        self.holders.append((child, tokens[:length]))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks, _ = data.draw(st.sampled_from(self.holders))
        self.manager.forget(blocks)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check(blocks for blocks, _ in self.holders)
        size = self.manager.block_size
        for blocks, tokens in self.holders:
            for index, block in enumerate(blocks):
                known = tokens[: (index + 1) * size]
                assert self.content[block][: len(known)] == tuple(known)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for blocks, _ in self.holders:
                self.manager.release(blocks)
            assert self.manager.num_free == self.manager.num_blocks


@pytest.mark.slow
def test_any_history_keeps_the_books_and_the_contents() -> None:
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=NUM_HISTORIES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=(Phase.generate, Phase.shrink),
        ),
    )
