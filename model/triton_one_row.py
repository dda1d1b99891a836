# ruff: noqa: N803 - by Triton's custom its compile-time arguments are written in capitals
"""Projections of a single row: what decoding one sequence consists of, as fast as weights can be read.

A matrix unit has nothing to do here, and libraries' products, made for many rows, leave much of the bandwidth unused.
Every program keeps the row in registers, normed where that is asked for, and streams over its share of the weights.
Importing this needs Triton. Runs in the worker process.

Legend: N outputs, K inputs, F intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.triton_layers import activated

MAX_NORMED = 8192
"""The longest row that is normed on the way in: a program holds it whole."""
CHUNK = 4096
PROGRAMS = 1056
"""Eight for each multiprocessor of a large GPU."""
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
    _norm_project[(min(PROGRAMS, triton.cdiv(num_outputs, rows)),)](
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
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
    )
    return summed, out


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [1, K], weight [N, K]; returns [1, N]."""
    num_outputs, size = weight.shape
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    columns = min(CHUNK, triton.next_power_of_2(size))
    rows = _rows(num_outputs, columns)
    _project[(triton.cdiv(num_outputs, rows),)](
        out,
        x,
        weight,
        bias,
        num_outputs,
        size,
        ROWS=rows,
        COLUMNS=columns,
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
    )
    return out


def _rows(num_outputs: int, columns: int) -> int:
    """Outputs that a program computes at once: few enough that all multiprocessors have some."""
    most = max(1, 8192 // columns)
    while most > 1 and num_outputs // most < PROGRAMS:
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
    STAGES: tl.constexpr,
):
    place = tl.arange(0, COLUMNS)
    real = place < size
    row = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(delta + place, mask=real, other=0.0).to(tl.float32)
        narrow = row.to(summed.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(summed + place, narrow, mask=real)
        row = narrow.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / size + epsilon)
    row = row * scale * (tl.load(gain + place, mask=real, other=0.0).to(tl.float32) + offset)
    # Rounded as it is between kernels, so that one row alone gives what it gives among others.
    row = row.to(x.dtype.element_ty).to(tl.float32)[None, :]
    for first in tl.range(tl.program_id(0) * ROWS, num_outputs, tl.num_programs(0) * ROWS, num_stages=STAGES):
        index = first + tl.arange(0, ROWS)
        there = index < num_outputs
        mask = there[:, None] & real[None, :]
        begin = index.to(tl.int64)[:, None] * size + place[None, :]
        found = tl.sum(tl.load(weight + begin, mask=mask, other=0.0).to(tl.float32) * row, 1)
        if bias is not None:
            found += tl.load(bias + index, mask=there, other=0.0).to(tl.float32)
        if GATE != "":
            other = tl.load(weight + num_outputs.to(tl.int64) * size + begin, mask=mask, other=0.0).to(tl.float32)
            second = tl.sum(other * row, 1)
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
    STAGES: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = index < num_outputs
    begin = index.to(tl.int64)[:, None] * size
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, size, COLUMNS, num_stages=STAGES):
        place = first + tl.arange(0, COLUMNS)
        real = place < size
        row = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
        mask = there[:, None] & real[None, :]
        products += tl.load(weight + begin + place[None, :], mask=mask, other=0.0).to(tl.float32) * row[None, :]
    found = tl.sum(products, 1)
    if bias is not None:
        found += tl.load(bias + index, mask=there, other=0.0).to(tl.float32)
    tl.store(out + index, found.to(out.dtype.element_ty), mask=there)
