"""The CPU backend against the reference, for every rule and every mixture of rows."""

import numpy as np
import pytest
import torch

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionRules
from model.attention.padded import groups_of_like_length
from model.attention.reference import ReferenceAttention
from tests.model.attention.conftest import HEADS

PAGED_ROWS = {
    "decode": [(1, 1), (1, 5), (1, 4), (1, 90), (1, 33), (1, 34)],
    "prompts": [(7, 7), (2, 2), (30, 30)],
    "chunks": [(7, 20), (2, 3), (5, 64)],
    "mixed": [(1, 40), (9, 9), (1, 2), (6, 50), (1, 41)],
    "longer than a slice of queries": [(300, 310), (1, 3)],
}


@pytest.mark.parametrize("rows", PAGED_ROWS.values(), ids=PAGED_ROWS.keys())
def test_paged_equals_the_reference(rules, make_paged, rows):
    query, cache, layout = make_paged(rows)
    arguments = (query, cache.keys[0], cache.values[0], layout, rules)
    torch.testing.assert_close(CpuAttention().paged(*arguments), ReferenceAttention().paged(*arguments))


@pytest.mark.parametrize("lens", [[7], [6, 6, 6], [3, 40, 41, 5, 4, 22, 1]], ids=["one", "equal", "mixed"])
def test_packed_equals_the_reference(rules, make_packed, lens):
    query, key, value, layout = make_packed(lens)
    arguments = (query, key, value, layout, rules)
    torch.testing.assert_close(CpuAttention().packed(*arguments), ReferenceAttention().packed(*arguments))


def test_layers_of_one_step_may_differ_in_their_rules(make_paged, make_packed):
    """What is kept in the layout after the first layer belongs to the rules it was made for."""
    query, cache, paged = make_paged(PAGED_ROWS["mixed"])
    q, k, v, packed = make_packed([3, 40, 41, 5])
    backend, reference = CpuAttention(), ReferenceAttention()
    for window in (None, 3, None, 8):
        rules = AttentionRules(scale=0.25, window=window)
        arguments = (query, cache.keys[0], cache.values[0], paged, rules)
        torch.testing.assert_close(backend.paged(*arguments), reference.paged(*arguments))
        torch.testing.assert_close(backend.packed(q, k, v, packed, rules), reference.packed(q, k, v, packed, rules))


def test_layers_with_biases_of_their_own_are_told_apart_and_leave_one_mask(make_paged, make_packed):
    """UMT5's layers left a mask each for as long as the step lasted: gigabytes, where texts are long."""
    query, cache, paged = make_paged(PAGED_ROWS["decode"])
    q, k, v, packed = make_packed([12, 12])
    backend, reference = CpuAttention(), ReferenceAttention()
    kept = []
    for layer in range(3):
        bias = torch.randn((HEADS, 11), generator=torch.Generator().manual_seed(layer))
        rules = AttentionRules(scale=1.0, causal=False, relative_bias=bias)
        arguments = (query, cache.keys[0], cache.values[0], paged, rules)
        torch.testing.assert_close(backend.paged(*arguments), reference.paged(*arguments))
        torch.testing.assert_close(backend.packed(q, k, v, packed, rules), reference.packed(q, k, v, packed, rules))
        kept.append((len(paged.prepared), len(packed.prepared)))
    assert len(set(kept)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_reference(rules, make_paged, dtype):
    query, cache, layout = make_paged(PAGED_ROWS["mixed"], dtype=dtype)
    arguments = (query, cache.keys[0], cache.values[0], layout, rules)
    found, expected = CpuAttention().paged(*arguments), ReferenceAttention().paged(*arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("block_size", "head_size"), [(16, 64), (32, 32), (16, 24), (4, 64)])
def test_what_it_wrote_it_reads(rules, make_paged, block_size, head_size, deterministic):
    """How keys and values lie is its own matter, which sizes and rules decide; all rows are written here."""
    rows = [(context, context) for _, context in PAGED_ROWS["mixed"]]
    query, plain, layout = make_paged(rows, dtype=torch.bfloat16, head_size=head_size, block_size=block_size)
    backend, cache = CpuAttention(deterministic=deterministic), torch.zeros_like(plain.pool)
    key, value = (tensor[0].flatten(0, 1)[layout.slots] for tensor in (plain.keys, plain.values))
    backend.write(key, value, cache[0, 0], cache[0, 1], layout.slots, rules)
    torch.testing.assert_close(
        backend.paged(query, cache[0, 0], cache[0, 1], layout, rules),
        ReferenceAttention().paged(query, plain.keys[0], plain.values[0], layout, rules),
        atol=0.03, rtol=0.03,
    )  # fmt: skip


def test_write_stores_each_token_at_its_slot(make_paged):
    _, cache, layout = make_paged([(3, 6), (1, 9)])
    before = cache.keys[0].clone()
    key = torch.randn((4, 2, 16))
    CpuAttention().write(key, key + 1, cache.keys[0], cache.values[0], layout.slots, AttentionRules(scale=0.25))
    flat = cache.keys[0].flatten(0, 1)
    torch.testing.assert_close(flat[layout.slots], key)
    torch.testing.assert_close(cache.values[0].flatten(0, 1)[layout.slots], key + 1)
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[layout.slots] = False
    torch.testing.assert_close(flat[untouched], before.flatten(0, 1)[untouched])


def test_groups_hold_every_row_once_and_waste_little():
    lens = np.array([9, 4, 8, 3])
    assert [group.tolist() for group in groups_of_like_length(lens, exact=False, slack=0)] == [[0, 2], [1, 3]]
    assert [group.tolist() for group in groups_of_like_length(lens, exact=True, slack=9)] == [[0], [2], [1], [3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_left_in_the_cache_is_not_read(make_paged, dtype):
    """A NaN in a freed slot, or in a block that only pads a table, once made a clean sequence's output NaN."""
    query, cache, layout = make_paged([(1, 3), (1, 30), (1, 5), (4, 9)], dtype=dtype)
    rules = AttentionRules(scale=0.25)
    clean = CpuAttention().paged(query, cache.keys[0], cache.values[0], layout, rules)
    held = torch.zeros(cache.keys[0].shape[:2], dtype=torch.bool)
    for table, length in zip(layout.block_tables.tolist(), layout.context_lens.tolist(), strict=True):
        for position in range(length):
            held[table[position // 4], position % 4] = True
    for tensor in (cache.keys[0], cache.values[0]):
        tensor[~held] = float("nan")
    layout.prepared.clear()
    torch.testing.assert_close(CpuAttention().paged(query, cache.keys[0], cache.values[0], layout, rules), clean)
