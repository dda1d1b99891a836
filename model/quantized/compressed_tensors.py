"""The formats of compressed-tensors: values one by one in 8 bits, or packed into words, scales by any strategy.

As `compressed_tensors/compressors` lays them out: packed integers are stored with half their range added, packed along
inputs, their zero points along outputs (or not at all, as older versions leave them). Runs in the worker process.

Legend: N outputs, K inputs of a weight; R by C scales.
"""

from torch import Tensor

from model.quantized.config import CompressedTensors, Scheme
from model.quantized.grids import Shape, dequantize, grid_shape, unpack
from model.quantized.parts import FLOATS, INDICES, Parts

EIGHT_BITS = ("I8", "F8_E4M3")


class CompressedTensorsFormat:
    """`weight` [N, K] or `weight_packed` [N, K * bits / 32] with `weight_shape`; `weight_scale`; perhaps
    `weight_zero_point`; `weight_g_idx` [K] where groups are not consecutive inputs."""

    parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def __init__(self, quantization: CompressedTensors) -> None:
        self._quantization = quantization

    def shape(self, parts: Parts) -> Shape:
        scheme = self._scheme(parts)
        shape = _packed_shape(parts, scheme) if scheme.packed else parts.check("weight", _kinds(scheme))
        parts.check_grid("weight_scale", FLOATS, shape, scheme.block)
        if not scheme.symmetric or "weight_zero_point" in parts:
            _check_zeros(parts, scheme, shape)
        if "weight_g_idx" in parts:
            parts.check("weight_g_idx", INDICES, (shape[1],))
        return shape

    def weight(self, parts: Parts) -> Tensor:
        scheme, shape = self._scheme(parts), self.shape(parts)
        scales = parts.grid("weight_scale", shape, scheme.block)
        groups = parts.groups("weight_g_idx", scales.shape[1])
        if not scheme.packed:
            zeros = parts.grid("weight_zero_point", shape, scheme.block) if "weight_zero_point" in parts else 0
            return dequantize(parts.tensor("weight"), scales, zeros, scheme.block, groups=groups)
        values = unpack(parts.tensor("weight_packed"), scheme.bits)[:, : shape[1]]
        return dequantize(values, scales, _unsigned_zeros(parts, scheme, shape), scheme.block, groups=groups)

    def _scheme(self, parts: Parts) -> Scheme:
        scheme = self._quantization.scheme(parts.module)
        if scheme is None:
            name = next(iter(parts.headers))
            raise parts.refused(name, "is of a quantized weight, but config.json names no scheme for its module")
        return scheme


def _kinds(scheme: Scheme) -> tuple[str, ...]:
    return ("F8_E4M3",) if scheme.floating else ("I8",)


def _packed_shape(parts: Parts, scheme: Scheme) -> Shape:
    """[N, K], which the words alone do not tell."""
    parts.check("weight_shape", INDICES, (2,))
    num_outputs, num_inputs = parts.tensor("weight_shape").tolist()
    parts.check("weight_packed", ("I32",), (num_outputs, _num_words(num_inputs, scheme)))
    return num_outputs, num_inputs


def _check_zeros(parts: Parts, scheme: Scheme, shape: Shape) -> None:
    if scheme.packed and "weight_zero_point" in parts and parts.headers["weight_zero_point"].kind == "I32":
        rows, columns = grid_shape(shape, scheme.block)
        parts.check("weight_zero_point", ("I32",), (_num_words(rows, scheme), columns))
    else:
        parts.check_grid("weight_zero_point", (*EIGHT_BITS, *FLOATS), shape, scheme.block)


def _unsigned_zeros(parts: Parts, scheme: Scheme, shape: Shape) -> Tensor | int:
    """The zero points with half the range added, as it is to the values."""
    half = 1 << (scheme.bits - 1)
    if "weight_zero_point" not in parts:
        return half
    if parts.headers["weight_zero_point"].kind != "I32":
        return parts.grid("weight_zero_point", shape, scheme.block).float() + half
    words = parts.tensor("weight_zero_point").t()  # [C, R * bits / 32]
    return unpack(words, scheme.bits)[:, : grid_shape(shape, scheme.block)[0]].t()


def _num_words(num_values: int, scheme: Scheme) -> int:
    return -(-num_values * scheme.bits // 32)
