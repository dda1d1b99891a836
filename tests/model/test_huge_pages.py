"""Memory in huge pages: whole, writable, zero at first, and kept as long as any tensor of it."""

import gc

import pytest
import torch

from model import huge_pages
from model.huge_pages import PAGE, Shelf


@pytest.mark.parametrize("shape", [(0,), (3, 5), (3, PAGE)])
def test_zeros_are_ordinary_tensors(shape: tuple[int, ...]) -> None:
    tensor = huge_pages.zeros(shape, torch.bfloat16)
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(2.0)
    assert float(tensor.float().sum()) == 2.0 * tensor.numel()


def test_large_ones_begin_with_a_page() -> None:
    assert huge_pages.zeros([PAGE], torch.int8).data_ptr() % PAGE == 0


def test_what_is_kept_is_equal_and_stays_when_its_shelf_has_gone() -> None:
    tensors = [
        torch.randn(700, 900),
        torch.arange(5, dtype=torch.int8),
        torch.empty(0),
        torch.randn(1000, 700).bfloat16(),
    ]
    shelf = Shelf([tensor.nbytes for tensor in tensors])
    kept = [shelf.keep(tensor) for tensor in tensors]
    del shelf
    gc.collect()
    for tensor, found in zip(tensors, kept, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert found.data_ptr() % 64 == 0


def test_a_shelf_holds_no_more_than_it_was_made_for() -> None:
    shelf = Shelf([64])
    shelf.keep(torch.zeros(16))
    with pytest.raises(RuntimeError):
        shelf.keep(torch.zeros(16))
