"""Paged attention against float64, on every set of instructions; a query's result knows neither batch nor chunk."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.ops import library

pytestmark = [
    pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)"),
    pytest.mark.usefixtures("instructions"),
]


def random_bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_8_bits(x: Tensor) -> Tensor:
    """What a cache of 8 bits gives back of heads [.., D]."""
    largest, most = x.float().abs().amax(-1, keepdim=True), torch.tensor(127.0)
    return (x.float() * (most / largest)).round() * (largest / most)


@dataclass
class Problem:
    """Sequences of (queries, context) in a paged cache; what no sequence wrote is not a number."""

    rows: list[tuple[int, int]]
    heads: int = 6
    groups: int = 2
    size: int = 64
    block_size: int = 16
    window: int = 0
    causal: bool = True
    narrow: bool = False
    """Whether the cache is in 8 bits."""

    def __post_init__(self) -> None:
        counts = [-(-context // self.block_size) for _, context in self.rows]
        dealt = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int().split(counts)
        shape = (sum(counts), self.block_size, self.groups, self.size)
        if self.narrow:
            unknown = torch.full((*shape[:-1], self.size + 4), -1, dtype=torch.int8)  # as a scale, four are no number
        else:
            unknown = torch.full(shape, torch.nan).bfloat16()
        self.keys, self.values = unknown.clone(), unknown.clone()
        self.tables = torch.zeros((len(counts), max(counts)), dtype=torch.int32)
        self.known = [
            tuple(random_bf16(context, self.groups, self.size, seed=2 * row + seed) for seed in (0, 1))
            for row, (_, context) in enumerate(self.rows)
        ]
        for row, (blocks, (_, context)) in enumerate(zip(dealt, self.rows, strict=True)):
            self.tables[row, : len(blocks)] = blocks
            slots = (blocks[:, None] * self.block_size + torch.arange(self.block_size)).flatten()[:context]
            torch.ops.slimpajama.store(*self.known[row], self.keys, self.values, slots.long())
        if self.narrow:
            self.known = [(in_8_bits(keys), in_8_bits(values)) for keys, values in self.known]
        self.query = random_bf16(sum(queries for queries, _ in self.rows), self.heads, self.size, seed=99)

    def found(self, query: Tensor | None = None, rows: list[int] | None = None, contexts: object = None) -> Tensor:
        """Of all rows; or of `rows` with other queries and contexts."""
        rows = list(range(len(self.rows))) if rows is None else rows
        query = self.query if query is None else query
        lens = [queries for queries, _ in self.rows] if contexts is None else [1] * len(rows)
        ends = [context for _, context in self.rows] if contexts is None else contexts
        starts = torch.tensor([0, *lens]).cumsum(0).int()
        out: Tensor = torch.ops.slimpajama.paged_attention(
            query, self.keys, self.values, self.tables[rows].contiguous(), starts, torch.tensor(ends).int(),
            self.size**-0.5, self.window, self.causal,
        )  # fmt: skip
        return out

    def expected(self) -> Tensor:
        parts, start = [], 0
        for row, (queries, context) in enumerate(self.rows):
            keys, values = (x.double().repeat_interleave(self.heads // self.groups, 1) for x in self.known[row])
            query = self.query[start : start + queries].double()
            scores = torch.einsum("qhd,khd->hqk", query, keys) * self.size**-0.5
            i, j = torch.arange(context - queries, context)[:, None], torch.arange(context)
            seen = j <= i if self.causal else torch.ones(queries, context, dtype=torch.bool)
            if self.window:
                seen &= (j > i - self.window) & (j < i + self.window)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(2)
            parts.append(torch.einsum("hqk,khd->qhd", weights, values))
            start += queries
        return torch.cat(parts)


MIXED = [(1, 1), (1, 16), (5, 17), (1, 33), (70, 70), (100, 300), (1, 256), (1, 257), (3, 600)]
PROBLEMS = {
    "plain": Problem(MIXED),
    "one head for each key head": Problem(MIXED, heads=3, groups=3),
    "many heads for a key head": Problem(MIXED, heads=20, groups=1, size=32),
    "large heads": Problem(MIXED, heads=4, groups=2, size=128),
    "largest heads": Problem(MIXED, heads=2, groups=1, size=256),
    "heads of no vector's size": Problem(MIXED, heads=6, groups=2, size=80),
    "more heads for a key head than are taken together": Problem(MIXED, heads=200, groups=1, size=32),
    "odd heads": Problem(MIXED, heads=7, groups=1, size=96),
    "small blocks": Problem(MIXED, block_size=4),
    "large blocks": Problem(MIXED, block_size=64),
    "window": Problem(MIXED, window=19),
    "window of one": Problem(MIXED, window=1),
    "wide window": Problem(MIXED, window=300),
    "both ways": Problem(MIXED, causal=False),
    "window both ways": Problem(MIXED, window=40, causal=False),
    "8 bits": Problem(MIXED, narrow=True),
    "8 bits, one head for each key head": Problem(MIXED, heads=3, groups=3, size=128, narrow=True),
    "8 bits, many heads for a key head": Problem(MIXED, heads=20, groups=1, size=32, narrow=True),
    "8 bits, more heads than are taken together": Problem(MIXED, heads=200, groups=1, size=32, narrow=True),
    "8 bits, largest heads, large blocks": Problem(MIXED, heads=2, groups=1, size=256, block_size=64, narrow=True),
    "8 bits, window both ways": Problem(MIXED, heads=7, groups=1, size=96, window=40, causal=False, narrow=True),
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS.keys())
def problem(request: pytest.FixtureRequest) -> Problem:
    found: Problem = request.param
    return found


def test_it_is_attention(problem: Problem) -> None:
    expected = problem.expected()
    error = (problem.found().double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert float(error.max()) < 0.006


def test_a_query_alone_finds_the_same_to_a_bit(problem: Problem) -> None:
    if not problem.causal:
        pytest.skip("alone it would be another query: the last one")
    rows = [row for row, (queries, _) in enumerate(problem.rows) for _ in range(queries)]
    ends = [context - queries + 1 + i for queries, context in problem.rows for i in range(queries)]
    assert torch.equal(problem.found(problem.query, rows, ends), problem.found())
    some = [0, 30, 99, 181]
    alone = [problem.found(problem.query[i : i + 1].contiguous(), [rows[i]], [ends[i]]) for i in some]
    assert torch.equal(torch.cat(alone), problem.found()[some])


def test_queries_may_be_a_view_of_what_was_computed_together() -> None:
    problem = Problem(MIXED)
    together = torch.cat((problem.query, random_bf16(len(problem.query), 4, 64, seed=5)), dim=1)
    assert torch.equal(problem.found(together[:, :6]), problem.found())


def test_a_query_that_is_not_finite_changes_no_other() -> None:
    problem = Problem(MIXED)
    sound = problem.found()
    query = problem.query.clone()
    query[10, 2, 5] = torch.nan
    found = problem.found(query)
    assert not found[10, 2].isfinite().any()
    found[10, 2] = sound[10, 2]
    assert torch.equal(found, sound)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_lost_in_8_bits(value: float) -> None:
    problem = Problem([(1, 40), (1, 40)], narrow=True)
    sound = problem.found()
    keys, values = (x[-1:].bfloat16() for x in problem.known[0])
    values[0, 1, 3] = value
    slot = problem.tables[0, 2].long() * problem.block_size + 39 % problem.block_size
    torch.ops.slimpajama.store(keys, values, problem.keys, problem.values, slot[None])
    found = problem.found()
    assert not found[0, 3:].isfinite().any()  # the heads of the second key head
    assert torch.equal(found[0, :3], sound[0, :3])
    assert torch.equal(found[1], sound[1])


def test_zeros_stay_zeros_in_8_bits() -> None:
    problem = Problem([(1, 16)], narrow=True)
    nothing = torch.zeros(16, 2, 64).bfloat16()
    torch.ops.slimpajama.store(nothing, nothing, problem.keys, problem.values, torch.arange(16))
    assert not problem.found().any()


@pytest.mark.parametrize(("block_size", "size"), [(8, 32), (16, 48), (16, 320)])
def test_8_bits_are_refused_where_strips_do_not_divide_a_block(block_size: int, size: int) -> None:
    with pytest.raises(RuntimeError, match="8 bits are for heads"):
        Problem([(1, 1)], size=size, block_size=block_size, narrow=True)
