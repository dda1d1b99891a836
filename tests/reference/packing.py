"""Weights quantized and packed in numpy, by the formats' published descriptions alone; knows nothing of this project.

W[n, k] = (values[n, k] - zeros[n, group]) * scales[n, group]. GPTQ as AutoGPTQ's `QuantLinear.pack` lays it out, AWQ as
AutoAWQ's `WQLinear_GEMM`, compressed-tensors as its `pack_to_int32`. A column at a time, for sizes of tests.

Legend: N outputs, K inputs, G groups of inputs.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: Array, bits: int, order: Sequence[int] | None = None) -> Array:
    """[R, C] small numbers to [R, C * bits / 32] words, the lowest bits first, in each word in this `order`."""
    per_word = 32 // bits
    order = range(per_word) if order is None else order
    packed = np.zeros((values.shape[0], -(-values.shape[1] // per_word)), np.uint32)
    for column in range(packed.shape[1]):
        for place, index in enumerate(order):
            source = column * per_word + index
            if source < values.shape[1]:
                packed[:, column] |= values[:, source].astype(np.uint32) << np.uint32(place * bits)
    return packed.view(np.int32)


def quantize(weight: Array, bits: int, groups: Array) -> tuple[Array, Array, Array]:
    """Values [N, K], zeros [N, G] and float16 scales [N, G], by the extremes of each group."""
    largest = 2**bits - 1
    parts = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    low = np.stack([part.min(1).clip(max=0) for part in parts], 1)
    high = np.stack([part.max(1).clip(min=0) for part in parts], 1)
    scales = ((high - low) / largest).astype(np.float16)
    zeros = np.rint(-low / scales.astype(np.float32)).clip(1, largest).astype(np.int64)
    values = np.rint(weight / scales[:, groups].astype(np.float32)) + zeros[:, groups]
    return values.clip(0, largest).astype(np.int64), zeros, scales


def plain(values: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    """[N, K], float32"""
    return ((values - zeros[:, groups]) * scales[:, groups].astype(np.float32)).astype(np.float32)


def gptq(values: Array, zeros: Array, scales: Array, bits: int, *, zero_offset: int = 1) -> dict[str, Array]:
    return {
        "qweight": words(values, bits).T.copy(),
        "qzeros": words(zeros.T - zero_offset, bits),
        "scales": scales.T.copy(),
    }


def awq(values: Array, zeros: Array, scales: Array) -> dict[str, Array]:
    return {
        "qweight": words(values.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.copy(),
    }
