"""Weights in 8-bit floating point beside their scales, as DeepSeek-V3, Qwen3-FP8 and vLLM's own tools store them.

`weight_scale_inv` is what the weight is multiplied by, for all its name, one value for each block (DeepSeek-V3,
arXiv 2412.19437, section 3.3.2); `weight_scale` the same for whole matrices or outputs. Runs in the worker process.
"""

from torch import Tensor

from model.quantized.config import CHANNEL, TENSOR, Block, Fp8
from model.quantized.grids import Shape, dequantize
from model.quantized.parts import FLOATS, Parts

KIND = "F8_E4M3"


class Fp8Format:
    parts = ("weight", "weight_scale_inv", "weight_scale")

    def __init__(self, quantization: Fp8) -> None:
        self._blocks = (quantization.block, TENSOR, CHANNEL)

    def shape(self, parts: Parts) -> Shape:
        shape = parts.check("weight", (KIND,))
        self._scales(parts, shape)
        return shape

    def weight(self, parts: Parts) -> Tensor:
        shape = self.shape(parts)
        name, block = self._scales(parts, shape)
        return dequantize(parts.tensor("weight"), parts.grid(name, shape, block), 0, block)

    def _scales(self, parts: Parts, shape: Shape) -> tuple[str, Block]:
        name = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
        return name, parts.check_grid(name, FLOATS, shape, *self._blocks)
