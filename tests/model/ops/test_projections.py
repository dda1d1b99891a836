"""Projections against float64, on every set of instructions, and the law that a row does not see its neighbours."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SHAPES = [
    (1, 16, 32),
    (1, 576, 576),
    (3, 100, 64),
    (5, 17, 30),
    (7, 50, 66),
    (13, 130, 96),
    (16, 32, 64),
    (25, 70, 128),
    (33, 40, 1),
    (47, 1, 200),
    (70, 96, 64),
    (100, 200, 4100),
    (600, 70, 64),
    (530, 290, 4100),
    (70, 290, 8200),
]


def random_bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = True) -> Tensor:
    packed = torch.ops.slimpajama.pack_bf16(weight)
    out: Tensor = torch.ops.slimpajama.linear_bf16(x, packed, bias, len(weight), wide)
    return out


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = True) -> Tensor:
    packed, scales, sums = torch.ops.slimpajama.pack_int8(weight)
    out: Tensor = torch.ops.slimpajama.linear_int8(x, packed, scales, sums, bias, len(weight), wide)
    return out


def int4_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = True) -> Tensor:
    packed, totals = torch.ops.slimpajama.pack_int4(weight)
    out: Tensor = torch.ops.slimpajama.linear_int4(x, packed, totals, bias, len(weight), wide)
    return out


def quantized_weight(values: Tensor) -> Tensor:
    scale = values.abs().amax(1, keepdim=True) / 127
    return (values * (1 / scale)).round().double() * scale.double()


def quantized_rows(values: Tensor) -> Tensor:
    """As the operators do it in float32, product and rounding one after the other."""
    least, most = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    scale = (most - least) / 255
    inverse = 1 / scale
    zero = (-least * inverse).round()
    return ((values * inverse).round() + zero).clamp(0, 255).sub(zero).double() * scale.double()


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_bfloat16_projection_is_the_product(
    rows: int, outputs: int, inputs: int, with_bias: bool, instructions: str
) -> None:
    x, weight = random_bf16(rows, inputs), random_bf16(outputs, inputs, seed=1)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    wide = bf16_linear(x, weight, bias)
    assert wide.dtype == torch.float32
    assert relative_error(wide, expected) < 1e-5
    assert torch.equal(bf16_linear(x, weight, bias, wide=False), wide.bfloat16())


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_int8_projection_is_the_product_of_the_quantized(
    rows: int, outputs: int, inputs: int, with_bias: bool, instructions: str
) -> None:
    x, weight = random_bf16(rows, inputs), random_bf16(outputs, inputs, seed=1)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)) if with_bias else None
    found = int8_linear(x, weight, bias)
    assert torch.equal(int8_linear(x, weight, bias, wide=False), found.bfloat16())
    if bias is not None:
        found = found - bias
    assert relative_error(found, quantized_rows(x.float()) @ quantized_weight(weight.float()).T) < 1e-6
    assert relative_error(found, x.double() @ weight.double().T) < 0.02


@pytest.mark.parametrize("linear", [bf16_linear, int8_linear, int4_linear])
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (100, 4100)])
def test_a_row_of_a_projection_does_not_depend_on_the_rows_beside_it(
    linear: Callable[[Tensor, Tensor], Tensor], outputs: int, inputs: int, instructions: str
) -> None:
    x, weight = random_bf16(71, inputs), random_bf16(outputs, inputs, seed=1)
    whole = linear(x, weight)
    for count in (1, 2, 4, 6, 7, 15, 16, 17, 31, 32, 33, 64):
        assert torch.equal(linear(x[:count].contiguous(), weight), whole[:count])
        assert torch.equal(linear(x[-count:].contiguous(), weight), whole[-count:])


@pytest.mark.parametrize("linear", [bf16_linear, int8_linear, int4_linear], ids=["bfloat16", "int8", "int4"])
def test_no_rows_give_none(linear: Callable[[Tensor, Tensor], Tensor], instructions: str) -> None:
    assert linear(random_bf16(0, 64), random_bf16(40, 64)).shape == (0, 40)


def test_all_instructions_give_the_same_int8_sums() -> None:
    x, weight = random_bf16(19, 300), random_bf16(50, 300, seed=1)
    found = []
    for name in ("lanes", "avx512", "amx"):
        torch.ops.slimpajama.limit_instructions(name)
        found.append(int8_linear(x, weight))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("linear", [bf16_linear, int8_linear, int4_linear])
def test_a_row_that_is_not_finite_changes_no_other(
    linear: Callable[[Tensor, Tensor], Tensor], instructions: str
) -> None:
    x, weight = random_bf16(20, 96), random_bf16(40, 96, seed=1)
    sound = linear(x, weight)
    x[3, 7], x[18, 95] = float("nan"), float("inf")
    found = linear(x, weight)
    others = [row for row in range(20) if row not in (3, 18)]
    assert torch.equal(found[others], sound[others])
    assert not found[3].isfinite().any()
