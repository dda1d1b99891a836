# ruff: noqa: N803 - by Triton's custom its compile-time arguments are written in capitals
"""Projections of a single row: what decoding one sequence consists of, as fast as weights can be read.

A matrix unit has nothing to do here, and libraries' products, made for many rows, leave much of the bandwidth unused.
Every program keeps the row in registers, normed where that is asked for, and multiplies it with its share of the
weights. From Hopper on (`early_start`) a kernel begins while the one before it still runs, and fetches weights
until that one's results are there: the memory is busy between the kernels, too.
Importing this needs Triton. Runs in the worker process.

Legend: N outputs, K inputs, F intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.triton_early import early_start, let_next_start, wait_for_previous
from model.triton_layers import activated

MAX_NORMED = 8192
"""The longest row that is normed on the way in: a program holds it whole."""
CHUNK = 4096
PROGRAMS = 1056
"""Eight for each multiprocessor of a large GPU: so many are on it at once."""
ENOUGH_PROGRAMS = 512
TILE = 8192
"""Weights that a program fetches at once."""
NUM_WARPS = 4
NUM_STAGES = 3
Norm = tuple[Tensor, float, float]
"""Weight [K], epsilon, and what is added to the weight."""


def norm_project(
    x: Tensor, delta: Tensor | None, norm: Norm, weight: Tensor, bias: Tensor | None, gate: str = ""
) -> tuple[Tensor, Tensor]:
    """x and delta [1, K], weight [N, K]; the sum [1, K], and its norm times the weight's transpose [1, N].

    With a `gate` (silu, gelu, gelu_tanh) the weight is [2F, K], gates first; the result is gate(first) * second [1, F].
    """
    num_outputs, size = weight.shape
    if gate:
        num_outputs //= 2
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    summed = x if delta is None else torch.empty_like(x)
    columns = triton.next_power_of_2(size)
    rows = _rows(num_outputs, columns)
    tiles = triton.cdiv(num_outputs, rows)
    early = early_start(x.device)
    _norm_project[(min(PROGRAMS, tiles),)](
        out,
        summed,
        x,
        x if delta is None else delta,
        norm[0],
        weight,
        bias,
        num_outputs,
        size,
        norm[1],
        norm[2],
        ADDS=delta is not None,
        GATE=gate,
        ROWS=rows,
        COLUMNS=columns,
        ONE_TILE=tiles <= PROGRAMS,
        EARLY=bool(early),
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
        **early,
    )
    return summed, out


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [1, K], weight [N, K]; returns [1, N]."""
    num_outputs, size = weight.shape
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    columns = min(CHUNK, triton.next_power_of_2(size))
    rows = _rows(num_outputs, columns)
    early = early_start(x.device)
    _project[(triton.cdiv(num_outputs, rows),)](
        out,
        x,
        weight,
        bias,
        num_outputs,
        size,
        ROWS=rows,
        COLUMNS=columns,
        ONE_TILE=size <= columns,
        EARLY=bool(early),
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
        **early,
    )
    return out


def _rows(num_outputs: int, columns: int) -> int:
    """Outputs that a program computes at once: few enough that all multiprocessors have some.

    Worked example: of 4,096 outputs with 1,024 columns a program takes 8, and there are 512; of 1,024 outputs, 2.
    """
    most = max(1, TILE // columns)
    while most > 1 and num_outputs // most < ENOUGH_PROGRAMS:
        most //= 2
    return most


@triton.jit
def _norm_project(
    out,
    summed,
    x,
    delta,
    gain,
    weight,
    bias,
    num_outputs,
    size,
    epsilon,
    offset,
    ADDS: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):
    place = tl.arange(0, COLUMNS)
    real = place < size
    begin = tl.program_id(0) * ROWS
    second = weight + num_outputs.to(tl.int64) * size
    tile, other = weight, second
    if ONE_TILE:
        tile = _tile(weight, begin, num_outputs, size, ROWS, COLUMNS)
        if GATE != "":
            other = _tile(second, begin, num_outputs, size, ROWS, COLUMNS)
    gains = tl.load(gain + place, mask=real, other=0.0).to(tl.float32) + offset
    if EARLY:
        let_next_start()
        wait_for_previous()
    row = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(delta + place, mask=real, other=0.0).to(tl.float32)
        narrow = row.to(summed.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(summed + place, narrow, mask=real)
        row = narrow.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / size + epsilon)
    # Rounded as it is between kernels, so that one row alone gives what it gives among others.
    row = (row * scale * gains).to(x.dtype.element_ty).to(tl.float32)
    if ONE_TILE:
        _finish(out, tile, other, row, bias, begin, num_outputs, GATE, ROWS)
    else:
        for first in tl.range(begin, num_outputs, tl.num_programs(0) * ROWS, num_stages=STAGES):
            next_tile = _tile(weight, first, num_outputs, size, ROWS, COLUMNS)
            next_other = next_tile
            if GATE != "":
                next_other = _tile(second, first, num_outputs, size, ROWS, COLUMNS)
            _finish(out, next_tile, next_other, row, bias, first, num_outputs, GATE, ROWS)


@triton.jit
def _tile(weight, first, num_outputs, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]: the weights of some outputs, zeros past the ends."""
    index = first + tl.arange(0, ROWS)
    place = tl.arange(0, COLUMNS)
    mask = (index < num_outputs)[:, None] & (place < size)[None, :]
    return tl.load(weight + index.to(tl.int64)[:, None] * size + place[None, :], mask=mask, other=0.0)


@triton.jit
def _finish(out, tile, other, row, bias, first, num_outputs, GATE: tl.constexpr, ROWS: tl.constexpr):
    """The products of the tile, or of both, with the row [COLUMNS]; with their bias, gated, to where they belong."""
    index = first + tl.arange(0, ROWS)
    there = index < num_outputs
    found = tl.sum(tile.to(tl.float32) * row[None, :], 1)
    if bias is not None:
        found += tl.load(bias + index, mask=there, other=0.0).to(tl.float32)
    if GATE != "":
        second = tl.sum(other.to(tl.float32) * row[None, :], 1)
        if bias is not None:
            second += tl.load(bias + num_outputs + index, mask=there, other=0.0).to(tl.float32)
        found = found.to(out.dtype.element_ty).to(tl.float32)
        second = second.to(out.dtype.element_ty).to(tl.float32)
        found = activated(found, GATE) * second
    tl.store(out + index, found.to(out.dtype.element_ty), mask=there)


@triton.jit
def _project(
    out,
    x,
    weight,
    bias,
    num_outputs,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    if ONE_TILE:
        place = tl.arange(0, COLUMNS)
        tile = _tile(weight, begin, num_outputs, size, ROWS, COLUMNS)
        if EARLY:
            let_next_start()
            wait_for_previous()
        row = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
        _finish(out, tile, tile, row, bias, begin, num_outputs, "", ROWS)
    else:
        if EARLY:
            let_next_start()
            wait_for_previous()
        index = begin + tl.arange(0, ROWS)
        there = index < num_outputs
        weights = weight + index.to(tl.int64)[:, None] * size
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.range(0, size, COLUMNS, num_stages=STAGES):
            place = first + tl.arange(0, COLUMNS)
            real = place < size
            row = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
            mask = there[:, None] & real[None, :]
            products += tl.load(weights + place[None, :], mask=mask, other=0.0).to(tl.float32) * row[None, :]
        found = tl.sum(products, 1)
        if bias is not None:
            found += tl.load(bias + index, mask=there, other=0.0).to(tl.float32)
        tl.store(out + index, found.to(out.dtype.element_ty), mask=there)
