"""The arithmetic that the formats share: values out of words, scales over the blocks that they belong to.

They store W = (Q - Z) S, elementwise: integers or small floats Q, less their zero points, times their scales. They
differ in how Q is packed and in how many values share an entry of Z and S.

Legend: N outputs, K inputs of a weight [N, K]; a grid [R, C] has one value for each of its blocks. Worker process.
"""

import torch
from torch import Tensor

from model.quantized.config import Block

Shape = tuple[int, ...]


def unpack(words: Tensor, bits: int) -> Tensor:
    """The values that lie in each 32-bit word, the lowest bits first: [..., n] to [..., n * 32 / bits], uint8.

    Worked example, 4 bits: the word 0x76543210 holds 0, 1, 2, 3, 4, 5, 6, 7.
    """
    octets = words.contiguous().view(torch.uint8)  # the lowest byte first, as safetensors stores words
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    values: Tensor = (octets.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def grid_shape(shape: Shape, block: Block) -> tuple[int, int]:
    """How many blocks there are along each dimension; the last ones may be cut short."""
    rows, columns = (1 if step is None else -(-size // step) for size, step in zip(shape, block, strict=True))
    return rows, columns


def dequantize(
    values: Tensor, scales: Tensor, zeros: Tensor | int, block: Block, *, groups: Tensor | None = None
) -> Tensor:
    """(values [N, K] - zeros [R, C]) * scales [R, C], in float32.

    `groups` [K] says which column of the grids an input belongs to, where these are not consecutive inputs.
    """
    if groups is not None:
        scales, block = scales[:, groups], (block[0], 1)
        zeros = zeros[:, groups] if isinstance(zeros, Tensor) else zeros
    blocks = _in_blocks(values, scales.shape, block)
    if isinstance(zeros, Tensor):
        blocks -= zeros.to(torch.float32)[:, None, :, None]
    elif zeros != 0:
        blocks -= zeros
    blocks *= scales.to(torch.float32)[:, None, :, None]
    return blocks.flatten(2).flatten(0, 1)[: values.shape[0], : values.shape[1]]


def _in_blocks(values: Tensor, grid: Shape, block: Block) -> Tensor:
    """[N, K] as [R, outputs of a block, C, inputs of a block], in float32; blocks that are cut short are filled up."""
    high, wide = (size if step is None else step for size, step in zip(values.shape, block, strict=True))
    whole = (grid[0] * high, grid[1] * wide)
    if whole == values.shape:
        filled = values.to(torch.float32, memory_format=torch.contiguous_format)
    else:
        filled = torch.zeros(whole)
        filled[: values.shape[0], : values.shape[1]] = values
    return filled.view(grid[0], high, grid[1], wide)
