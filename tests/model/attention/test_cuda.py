"""The choice of kernels, which is arithmetic and runs anywhere; and with a GPU, every kernel against the reference."""

import dataclasses

import pytest
import torch

from model.attention import cuda
from model.attention.cuda import CudaAttention, flash_window, paged_kernel, serves_flash
from model.attention.interface import AttentionRules
from model.attention.reference import ReferenceAttention

PLAIN = AttentionRules(scale=0.125)
SHAPED = {
    "softcap": AttentionRules(scale=0.125, softcap=5.0),
    "alibi": AttentionRules(scale=0.125, alibi_slopes=torch.ones(4)),
    "relative": AttentionRules(scale=0.125, relative_bias=torch.ones(4, 3)),
}


def test_flash_serves_plain_rules_in_half_precision():
    assert serves_flash(torch.bfloat16, 128, PLAIN)
    assert serves_flash(torch.float16, 64, AttentionRules(scale=1.0, window=9, causal=False))
    assert not serves_flash(torch.float32, 64, PLAIN)
    assert not serves_flash(torch.bfloat16, 60, PLAIN)
    assert not serves_flash(torch.bfloat16, 512, PLAIN)


@pytest.mark.parametrize("rules", SHAPED.values(), ids=SHAPED.keys())
def test_what_shapes_the_scores_is_beyond_flash(rules):
    assert not serves_flash(torch.bfloat16, 64, rules)


def test_small_blocks_and_shaped_scores_go_to_triton_and_the_rest_to_flash(monkeypatch):
    monkeypatch.setattr(cuda, "triton_paged", lambda *arguments: None)
    monkeypatch.setattr(cuda, "FLASH_READS_PAGES", True)
    assert paged_kernel(torch.bfloat16, 64, 16, PLAIN) == "triton"
    assert paged_kernel(torch.bfloat16, 64, 256, PLAIN) == "flash"
    assert paged_kernel(torch.float32, 64, 256, PLAIN) == "triton"
    for rules in SHAPED.values():
        assert paged_kernel(torch.bfloat16, 64, 256, rules) == "triton"
    monkeypatch.setattr(cuda, "FLASH_READS_PAGES", False)  # as in earlier versions of torch
    assert paged_kernel(torch.bfloat16, 64, 256, PLAIN) == "triton"


def test_sinks_and_a_missing_triton_leave_the_reference(monkeypatch):
    monkeypatch.setattr(cuda, "triton_paged", lambda *arguments: None)
    assert paged_kernel(torch.bfloat16, 64, 16, AttentionRules(scale=1.0, sinks=torch.ones(4))) == "reference"
    monkeypatch.setattr(cuda, "triton_paged", None)
    assert paged_kernel(torch.bfloat16, 64, 16, PLAIN) == "reference"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_flash_windows_are_ours(causal, window):
    """Flash shows query i the keys from i - before to i + after."""
    before, after = flash_window(AttentionRules(scale=1.0, causal=causal, window=window))
    for ahead in range(-6, 7):
        ours = (ahead <= 0 or not causal) and (window is None or -window < ahead < window)
        theirs = (before == -1 or ahead >= -before) and (after == -1 or ahead <= after)
        assert ours == theirs


def moved(value):
    """A layout or rules with their tensors on the device."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "prepared"}
    return type(value)(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[(1, 5), (1, 90), (1, 700)], [(1, 40), (9, 9), (6, 50)]], ids=["decode", "mixed"])
def test_paged_on_a_gpu_equals_the_reference(rules, make_paged, rows, dtype):
    query, cache, layout = make_paged(rows, dtype=dtype)
    expected = ReferenceAttention().paged(query, cache.keys[0], cache.values[0], layout, rules)
    found = CudaAttention().paged(
        query.cuda(), cache.keys[0].cuda(), cache.values[0].cuda(), moved(layout), moved(rules)
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_on_a_gpu_equals_the_reference(rules, make_packed, dtype):
    query, key, value, layout = make_packed([3, 40, 41, 5, 4, 22, 1], dtype=dtype)
    expected = ReferenceAttention().packed(query, key, value, layout, rules)
    found = CudaAttention().packed(query.cuda(), key.cuda(), value.cuda(), moved(layout), moved(rules))
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)
