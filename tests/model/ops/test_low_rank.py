"""The operator that adds an adapter's product: right for any size, and for each row what it is for that row alone."""

import pytest
import torch

from model.ops import library

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators are not compiled here")

SIZES = [(1, 64, 48, 8), (7, 576, 960, 48), (150, 100, 40, 3), (65, 32, 17, 33), (2, 31, 5, 1)]


def add(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    found = out.clone()
    pack = torch.ops.slimpajama.pack_bf16
    torch.ops.slimpajama.add_low_rank(x, pack(a), pack(b), found)
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_adds_the_products_to_what_is_there(sizes: tuple[int, int, int, int]) -> None:
    num_rows, inputs, outputs, rank = sizes
    generator = torch.Generator().manual_seed(0)
    x, a, b, out = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((num_rows, inputs), (rank, inputs), (outputs, rank), (num_rows, outputs))
    )
    found = add(x, a, b, out)
    small = (x.double() @ a.double().T).bfloat16().double()
    expected = out.double() + small @ b.double().T
    # One rounding of the small results may fall to the other side, and the sum is rounded once.
    bound = 2**-8 * (expected.abs() + small.abs() @ b.double().abs().T) + 1e-6
    assert ((found.double() - expected).abs() <= bound).all()
    assert (found.double() - expected).abs().mean() < 2**-9 * expected.abs().mean()
    for row in range(num_rows):
        assert torch.equal(add(x[row : row + 1], a, b, out[row : row + 1])[0], found[row])


def test_weights_of_other_sizes_are_refused() -> None:
    x, a, b = torch.zeros(2, 64).bfloat16(), torch.zeros(8, 64).bfloat16(), torch.zeros(48, 8).bfloat16()
    with pytest.raises(RuntimeError, match="other sizes"):
        add(x, a, torch.zeros(48, 40).bfloat16(), torch.zeros(2, 48).bfloat16())
    with pytest.raises(RuntimeError, match="other sizes"):
        add(x, a, b, torch.zeros(2, 90).bfloat16())
    with pytest.raises(RuntimeError, match="other sizes"):
        add(torch.zeros(2, 160).bfloat16(), a, b, torch.zeros(2, 48).bfloat16())
