"""Attention of one row in one kernel, against the plain steps: on a GPU, or anywhere in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F

from model.attention.interface import AttentionRules, PagedLayout
from model.attention.reference import ReferenceAttention
from model.kv_cache import KVCache
from model.layers import rotate

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from model.attention.triton_one_row import attend_one_row, serves  # noqa: E402 - needs Triton

DEVICE = "cpu" if INTERPRETED else "cuda"
NUM_HEADS, NUM_KV_HEADS, SIZE, BLOCK_SIZE = 6, 2, 24, 4


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(context: int) -> tuple[torch.Tensor, KVCache, PagedLayout]:
    """A projected row, and a cache with all of its context but itself."""
    cache = KVCache(
        1, 300, block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=SIZE, dtype=torch.float32, device=DEVICE
    )
    cache.pool.copy_(random(*cache.pool.shape, seed=1))
    table = torch.randperm(300, generator=torch.Generator().manual_seed(2))[: -(-context // BLOCK_SIZE)].int()
    slot = int(table[-1]) * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    cache.keys[0].view(-1, NUM_KV_HEADS, SIZE)[slot] = float("nan")  # whatever was there counts for nothing
    layout = PagedLayout(
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([context], dtype=torch.int32, device=DEVICE),
        block_tables=table[None].to(DEVICE),
        slots=torch.tensor([slot], device=DEVICE),
        max_query_len=1,
        max_context_len=1200,  # as in a recorded step: of the longest text there may be
    )
    return random(1, NUM_HEADS + 2 * NUM_KV_HEADS, SIZE, seed=3), cache, layout


RULES = {
    "plain": AttentionRules(scale=0.2),
    "window": AttentionRules(scale=0.2, window=70),
    "softcap": AttentionRules(scale=0.2, softcap=2.0),
}


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotated", [0, 8, 24])
@pytest.mark.parametrize("context", [1, 64, 65, 700, 1200])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_one_row_is_turned_stored_and_attends(rules, context, rotated, normed):
    fused, cache, layout = problem(context)
    plain = KVCache(
        1, 300, block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=SIZE, dtype=torch.float32, device=DEVICE
    )
    plain.pool.copy_(cache.pool)
    rotation = norm = None
    query, key, value = fused.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
    if normed:
        norm = (random(SIZE, seed=4), random(SIZE, seed=5), 1e-6, 1.0)
        query, key = (
            F.rms_norm(part, (SIZE,), gain + 1.0, 1e-6) for part, gain in zip((query, key), norm[:2], strict=True)
        )
    if rotated:
        angles = random(1, 1, rotated // 2, seed=6)
        cos, sin = angles.cos(), angles.sin()
        rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        query, key = rotate(query, rotation), rotate(key, rotation)
    reference = ReferenceAttention()
    reference.write(key, value, plain.keys[0], plain.values[0], layout.slots, rules)
    expected = reference.paged(query, plain.keys[0], plain.values[0], layout, rules)

    arrived = torch.zeros(NUM_KV_HEADS, dtype=torch.int32, device=DEVICE)
    found = attend_one_row(fused, rotation, norm, cache.keys[0], cache.values[0], layout, rules, arrived)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.pool, plain.pool)
    assert not arrived.any(), "the next layer counts from zero"


@pytest.mark.parametrize("place", [0, 400])
def test_a_key_that_is_no_number_makes_none_of_the_row(place):
    fused, cache, layout = problem(700)
    block = layout.block_tables[0, place // BLOCK_SIZE]
    cache.keys[0][block, place % BLOCK_SIZE] = float("nan")
    arrived = torch.zeros(NUM_KV_HEADS, dtype=torch.int32, device=DEVICE)
    rules = RULES["plain"]
    found = attend_one_row(fused, None, None, cache.keys[0], cache.values[0], layout, rules, arrived)
    assert found.isnan().all()


def test_what_the_kernel_does_not_know_it_does_not_serve():
    assert serves(AttentionRules(scale=1.0, window=3, softcap=2.0), 6, 2)
    assert not serves(AttentionRules(scale=1.0, causal=False), 6, 2)
    assert not serves(AttentionRules(scale=1.0, alibi_slopes=torch.ones(6)), 6, 2)
    assert not serves(AttentionRules(scale=1.0, relative_bias=torch.ones(6, 3)), 6, 2)
    assert not serves(AttentionRules(scale=1.0, sinks=torch.ones(6)), 6, 2)
    assert not serves(AttentionRules(scale=1.0), 64, 2)
