"""Weights in 4 bits: what of them is kept, and their products against float64 on every set of instructions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.gguf.blocks import plain
from model.ops import library

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the operators were not compiled (no C++ compiler?)")

GROUP = 32
SHAPES = [
    (1, 16, 32),
    (1, 576, 576),
    (2, 33, 96),
    (3, 100, 64),
    (5, 17, 30),
    (6, 64, 160),
    (7, 50, 66),
    (13, 130, 96),
    (33, 40, 1),
    (47, 1, 200),
    (70, 290, 4100),
    (600, 70, 64),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = True) -> Tensor:
    packed, totals = torch.ops.slimpajama.pack_int4(weight)
    out: Tensor = torch.ops.slimpajama.linear_int4(x, packed, totals, bias, len(weight), wide)
    return out


def kept(weight: Tensor) -> Tensor:
    """What is kept of a weight, float64: chunks [pair, index, panel of the pair, bytes] put back in order."""
    outputs, inputs = weight.shape
    packed, _ = torch.ops.slimpajama.pack_int4(weight)
    pairs, chunks = packed.shape[:2]
    chunk = packed.transpose(1, 2).reshape(2 * pairs, chunks, -1)
    scales = chunk[..., :64].contiguous().view(torch.float16).view(-1, chunks, 2, 16).permute(0, 3, 1, 2)
    lines = chunk[..., 64:].reshape(-1, chunks, 2, 4, 16, 4).view(torch.int8)
    fours = torch.stack((lines >> 4, lines << 4 >> 4), dim=4)  # [panel, chunk, group, line, half, output, 4]
    values = fours.permute(0, 5, 1, 2, 3, 4, 6).reshape(len(chunk) * 16, -1, GROUP)
    whole = values.double() * scales.reshape(len(values), -1, 1).double()
    return whole.reshape(len(values), -1)[:outputs, :inputs]


def quantized_rows(x: Tensor) -> Tensor:
    """As the operators do it in float32, product and rounding one after the other."""
    values = x.float()
    least, most = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    scale = (most - least) / 255
    inverse = 1 / scale
    zero = (-least * inverse).round()
    return ((values * inverse).round() + zero).clamp(0, 255).sub(zero).double() * scale.double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def q4_0(weight: Tensor) -> Tensor:
    """As ggml quantizes: the value of largest magnitude becomes -8."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    values = (groups * (1 / scale) + 8.5).trunc().clamp(0, 15) - 8
    return (values * scale.half().float()).view(weight.shape)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_projection_is_the_product_of_what_is_kept(
    rows: int, outputs: int, inputs: int, with_bias: bool, instructions: str
) -> None:
    x, weight = random(rows, inputs), random(outputs, inputs, seed=1)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)) if with_bias else None
    found = multiply(x, weight, bias)
    assert torch.equal(multiply(x, weight, bias, wide=False), found.bfloat16())
    if bias is not None:
        found = found - bias
    assert relative_error(found, quantized_rows(x) @ kept(weight).T) < 2e-6
    assert relative_error(found, x.double() @ weight.double().T) < 0.12


@pytest.mark.parametrize("value", [-1.0, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_the_largest_sums_of_a_group_are_exact(rows: int, value: float, instructions: str) -> None:
    """All inputs 255 and all weights -8: on lanes 16 bits hold just that."""
    x, weight = torch.ones(rows, 128).bfloat16(), torch.full((32, 128), value).bfloat16()
    assert torch.equal(multiply(x, weight), torch.full((rows, 32), 128 * value))


def test_all_instructions_give_the_same_to_a_bit() -> None:
    x, weight = random(19, 300), random(50, 300, seed=1)
    found = []
    for name in ("lanes", "avx512", "amx"):
        torch.ops.slimpajama.limit_instructions(name)
        found.append(multiply(x, weight))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize(("lowest", "highest"), [(-8, 7), (-7, 7), (-3, 7), (-5, 5), (-3, 3), (-2, 1), (-1, 1), (0, 1)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_that_lie_in_steps_of_a_float16_are_kept_exactly(lowest: int, highest: int, sign: int) -> None:
    """As those of Q4_0 do, and others' whose values need not go to -8; whole ones' scales below normal numbers, too."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(lowest, highest + 1, (48, 12, GROUP), generator=generator)
    scales = torch.rand(48, 12, 1, generator=generator).mul(9).sub(20 if lowest == -8 else 9).exp2().half()
    weight = (values * scales.float() * sign).view(48, -1)
    assert torch.equal(kept(weight), weight.double())


def test_weights_of_gguf_blocks_are_kept_exactly() -> None:
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (40 * 6, 18), np.uint8)
    blocks[:, :2] = generator.uniform(-0.1, 0.1, (40 * 6, 1)).astype(np.float16).view(np.uint8)
    weight = torch.from_numpy(plain("Q4_0", blocks)).view(40, 6 * GROUP)
    assert torch.equal(kept(weight), weight.double())


def test_no_group_is_further_off_than_by_the_rule_of_q4_0() -> None:
    weight = random(64, 512) * torch.linspace(0.01, 3, 512).bfloat16()
    own, theirs = (
        (found - weight.double()).view(64, -1, GROUP).norm(dim=2) for found in (kept(weight), q4_0(weight).double())
    )
    assert (own <= theirs * (1 + 1e-6)).all()
    assert own.norm() < 0.95 * theirs.norm()


@pytest.mark.parametrize("place", [0, 31, 45])
def test_groups_of_zeros_and_single_values_are_kept_exactly(place: int) -> None:
    weight = torch.zeros(3, 64)
    weight[1, place] = 0.75
    assert torch.equal(kept(weight), weight.double())


def test_weights_beyond_float16_are_cut_rather_than_infinite(instructions: str) -> None:
    weight = torch.full((16, 32), 1e7)
    assert torch.equal(kept(weight), torch.full((16, 32), 65504.0 * 8).double())
    assert multiply(torch.ones(1, 32).bfloat16(), weight).isfinite().all()


def test_what_bfloat16_left_of_q4_0_is_kept_as_near_to_it() -> None:
    """Weights are in bfloat16 when they are packed: their steps are found again, and about what these were."""
    weight = q4_0(random(128, 1024).float())
    found, rounded = kept(weight.bfloat16()), weight.bfloat16()
    assert relative_error(found, weight.double()) < relative_error(rounded, weight.double())
    assert float((found / weight).sub(1).abs().nan_to_num(0).amax()) < 0.01
