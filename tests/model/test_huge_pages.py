"""Memory in huge pages: whole, writable, zero at first, and kept as long as any tensor of it."""

import gc

import pytest
import torch

from model import huge_pages
from model.huge_pages import PAGE, PIECE, Shelf


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


def test_a_shelf_grows_by_pieces_in_which_tensors_lie_side_by_side() -> None:
    shelf = Shelf()
    tensors = [torch.randn(5, 16) for _ in range(3)] + [torch.randn(PIECE // 4)]
    kept = [shelf.keep(tensor) for tensor in tensors]
    places = [found.data_ptr() for found in kept]
    assert places[1] - places[0] == places[2] - places[1] == 5 * 16 * 4
    assert not 0 <= places[3] - places[0] < PIECE
    for tensor, found in zip(tensors, kept, strict=True):
        assert torch.equal(found, tensor)
