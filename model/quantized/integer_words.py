"""GPTQ and AWQ: small integers packed into 32-bit words, a scale and a zero point for each output and group of inputs.

Both store the transpose, [inputs, outputs]. GPTQ (arXiv 2210.17323, as AutoGPTQ's `QuantLinear.pack` lays it out) packs
weights along inputs and zeros along outputs; AWQ (arXiv 2306.00978, AutoAWQ's `WQLinear_GEMM`) packs both along
outputs, in the order in which its kernel wants them. Runs in the worker process.

Legend: N outputs, K inputs, G groups of inputs.
"""

import torch
from torch import Tensor

from model.quantized.config import Awq, Block, Gptq
from model.quantized.grids import Shape, dequantize, grid_shape, unpack
from model.quantized.parts import FLOATS, INDICES, Parts

WORD_BITS = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies in which four bits of a word, from the lowest on."""


class GptqFormat:
    """`qweight` [K * bits / 32, N], `qzeros` [G, N * bits / 32], `scales` [G, N], `g_idx` [K]."""

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, quantization: Gptq) -> None:
        self._bits = quantization.bits
        self._zero_offset = quantization.zero_offset
        self._block: Block = (1, quantization.group_size)

    def shape(self, parts: Parts) -> Shape:
        num_words, num_outputs = parts.check("qweight", ("I32",))
        shape = (num_outputs, num_words * WORD_BITS // self._bits)
        num_groups = grid_shape(shape, self._block)[1]
        parts.check("scales", FLOATS, (num_groups, num_outputs))
        parts.check("qzeros", ("I32",), (num_groups, -(-num_outputs * self._bits // WORD_BITS)))
        if "g_idx" in parts:
            parts.check("g_idx", INDICES, (shape[1],))
        return shape

    def weight(self, parts: Parts) -> Tensor:
        values = unpack(parts.tensor("qweight").t(), self._bits)  # [N, K]
        scales = parts.tensor("scales").t()  # [N, G]
        zeros = unpack(parts.tensor("qzeros"), self._bits)[:, : len(scales)].t()  # [N, G]
        groups = parts.groups("g_idx", scales.shape[1])
        return dequantize(values, scales, zeros.float() + self._zero_offset, self._block, groups=groups)


class AwqFormat:
    """`qweight` [K, N / 8], `qzeros` [G, N / 8], `scales` [G, N]."""

    parts = ("qweight", "qzeros", "scales")
    bits = 4

    def __init__(self, quantization: Awq) -> None:
        self._block: Block = (1, quantization.group_size)

    def shape(self, parts: Parts) -> Shape:
        num_inputs, num_words = parts.check("qweight", ("I32",))
        shape = (num_words * WORD_BITS // self.bits, num_inputs)
        num_groups = grid_shape(shape, self._block)[1]
        parts.check("scales", FLOATS, (num_groups, shape[0]))
        parts.check("qzeros", ("I32",), (num_groups, num_words))
        return shape

    def weight(self, parts: Parts) -> Tensor:
        values, zeros = (self._outputs_in_order(parts.tensor(name)).t() for name in ("qweight", "qzeros"))
        return dequantize(values, parts.tensor("scales").t(), zeros, self._block)

    def _outputs_in_order(self, words: Tensor) -> Tensor:
        """[rows, N / 8] words to [rows, N] values."""
        places = torch.tensor(AWQ_ORDER).argsort()
        neighbours = unpack(words, self.bits).view(len(words), -1, len(AWQ_ORDER))
        return neighbours[..., places].flatten(1)
