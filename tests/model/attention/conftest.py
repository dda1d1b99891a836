"""Factories of random attention problems: packed sequences, and sequences spread over a paged cache."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention.interface import AttentionRules, PackedLayout, PagedLayout
from model.kv_cache import KVCache

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 6, 2, 16, 4


def _slopes() -> Tensor:
    return 2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float32)


def _relative() -> Tensor:
    return torch.randn((HEADS, 2 * 5 + 1), generator=torch.Generator().manual_seed(3))


RULES = {
    "causal": AttentionRules(scale=0.25),
    "whole": AttentionRules(scale=0.25, causal=False),
    "window": AttentionRules(scale=0.25, window=5),
    "window both ways": AttentionRules(scale=0.25, window=3, causal=False),
    "softcap": AttentionRules(scale=0.5, softcap=2.0),
    "softcap and window": AttentionRules(scale=0.5, softcap=2.0, window=6),
    "alibi": AttentionRules(scale=0.25, alibi_slopes=_slopes()),
    "alibi both ways": AttentionRules(scale=0.25, alibi_slopes=_slopes(), causal=False),
    "relative": AttentionRules(scale=1.0, relative_bias=_relative()),
    "relative both ways": AttentionRules(scale=1.0, relative_bias=_relative(), causal=False),
    "everything": AttentionRules(
        scale=0.3, window=7, softcap=3.0, alibi_slopes=_slopes(), relative_bias=_relative(), causal=True
    ),
    "sinks": AttentionRules(scale=0.25, sinks=torch.linspace(-1, 1, HEADS)),
}

PagedProblem = tuple[Tensor, KVCache, PagedLayout]
PackedProblem = tuple[Tensor, Tensor, Tensor, PackedLayout]


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rules(request: pytest.FixtureRequest) -> AttentionRules:
    found: AttentionRules = request.param
    return found


@pytest.fixture
def make_paged() -> Callable[..., PagedProblem]:
    """`make_paged([(queries, context), ...])`: queries, and a cache whose blocks are dealt in random order."""

    def make(
        rows: list[tuple[int, int]],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        head_size: int = HEAD_SIZE,
        block_size: int = BLOCK_SIZE,
    ) -> PagedProblem:
        random = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-context // block_size) for _, context in rows]
        cache = KVCache(
            1,
            sum(counts) + 3,
            block_size=block_size,
            num_kv_heads=KV_HEADS,
            head_size=head_size,
            dtype=dtype,
            device="cpu",
        )
        for tensor in (cache.keys[0], cache.values[0]):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        free = iter(random.permutation(cache.num_blocks).tolist())
        tables = torch.zeros((len(rows), max(counts)), dtype=torch.int32)
        for row, count in enumerate(counts):
            tables[row, :count] = torch.tensor([next(free) for _ in range(count)])
        starts = np.cumsum([0] + [queries for queries, _ in rows])
        slots = [
            int(tables[row, position // block_size]) * block_size + position % block_size
            for row, (queries, context) in enumerate(rows)
            for position in range(context - queries, context)
        ]
        layout = PagedLayout(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
            block_tables=tables,
            slots=torch.tensor(slots, dtype=torch.int64),
            max_query_len=max(queries for queries, _ in rows),
            max_context_len=max(context for _, context in rows),
        )
        query = torch.randn((int(starts[-1]), HEADS, head_size), generator=generator).to(dtype)
        return query, cache, layout

    return make


@pytest.fixture
def make_packed() -> Callable[..., PackedProblem]:
    def make(lens: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PackedProblem:
        generator = torch.Generator().manual_seed(seed)
        total = sum(lens)
        query = torch.randn((total, HEADS, HEAD_SIZE), generator=generator).to(dtype)
        key, value = torch.randn((2, total, KV_HEADS, HEAD_SIZE), generator=generator).to(dtype)
        starts = torch.tensor(np.cumsum([0, *lens]), dtype=torch.int32)
        return query, key, value, PackedLayout(starts=starts, max_len=max(lens))

    return make
