"""The Triton kernel against the reference: on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from model.attention.interface import AttentionRules
from model.attention.reference import ReferenceAttention

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from model.attention.triton_paged import triton_paged  # noqa: E402 - needs Triton

DEVICE = "cpu" if INTERPRETED else "cuda"
ROWS = {
    "decode": [(1, 1), (1, 5), (1, 64), (1, 130)],
    "long decode, split": [(1, 1200), (1, 3), (1, 600)],
    "prompts": [(7, 7), (2, 2), (70, 70)],
    "chunks": [(7, 20), (2, 3), (5, 150)],
    "mixed": [(1, 40), (9, 9), (1, 2), (25, 50)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_the_kernel_equals_the_reference(rules, make_paged, rows):
    if rules.sinks is not None:
        pytest.skip("sinks are the reference's")
    query, cache, layout = make_paged(rows)
    expected = ReferenceAttention().paged(query, cache.keys[0], cache.values[0], layout, rules)
    moved = type(layout)(
        **{
            name: value.to(DEVICE) if isinstance(value := getattr(layout, name), torch.Tensor) else value
            for name in ("query_starts", "context_lens", "block_tables", "slots", "max_query_len", "max_context_len")
        }
    )
    on_device = type(rules)(
        **{
            name: value.to(DEVICE) if isinstance(value := getattr(rules, name), torch.Tensor) else value
            for name in type(rules).__slots__
        }
    )
    found = triton_paged(query.to(DEVICE), cache.keys[0].to(DEVICE), cache.values[0].to(DEVICE), moved, on_device)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_key_that_is_no_number_makes_none_of_the_row(make_paged, place):
    """Also where the context is split, and a split that has seen nothing counts for nothing."""
    query, cache, layout = make_paged([(1, 300)])
    block_size = cache.keys[0].shape[1]
    cache.keys[0][layout.block_tables[0, place // block_size], place % block_size] = float("nan")
    moved = {name: getattr(layout, name) for name in ("query_starts", "context_lens", "block_tables", "slots")}
    layout = type(layout)(
        **{name: value.to(DEVICE) for name, value in moved.items()}, max_query_len=1, max_context_len=300
    )
    caches = cache.keys[0].to(DEVICE), cache.values[0].to(DEVICE)
    found = triton_paged(query.to(DEVICE), *caches, layout, AttentionRules(scale=0.25))
    assert found.isnan().all()
