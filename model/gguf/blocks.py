"""Blocks of quantized values as GGUF files store them, made plain: exactly the numbers that ggml computes of them.

Source of the layouts: github.com/ggml-org/ggml, the structs of src/ggml-common.h and `dequantize_row_*` of
src/ggml-quants.c. Runs in the worker process.

Legend: B blocks; a block of the small types has 32 values, one of the others 256, in 8 parts of 32 or 16 of 16.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What the sixteen values of the IQ4 types stand for."""


def plain(kind: str, blocks: Bytes) -> Floats:
    """blocks [B, bytes of a block] of one type; returns [B, values of a block]."""
    # Scales of a hostile file may be infinite; what comes of them is the file's affair.
    with np.errstate(invalid="ignore", over="ignore"):
        found: Floats = FORMS[kind](blocks).reshape(len(blocks), -1)
    return found


def _half(blocks: Bytes, place: int) -> Floats:
    """The 16-bit number at a place of each block: [B, 1]."""
    return blocks[:, place : place + 2].copy().view(np.float16).astype(np.float32)


def _cut(packed: Bytes, bits: int, run: int) -> Bytes:
    """Small numbers out of bytes, the lowest bits first, of each `run` of bytes the first of all before the second.

    Worked example: the bytes 0x21 0x43, cut into 4 bits by runs of 2, are 1 3 2 4. Returns [B, n / run, 8 / bits, run].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    mask = np.uint8((1 << bits) - 1)
    found: Bytes = (packed.reshape(len(packed), -1, 1, run) >> shifts) & mask
    return found


def _signed(values: Bytes, zero: int) -> Floats:
    return values.astype(np.float32) - np.float32(zero)


def _fives(blocks: Bytes, place: int) -> Bytes:
    """5-bit values, whose high bits come first: [B, 32]."""
    high = np.unpackbits(blocks[:, place : place + 4], axis=1, bitorder="little")
    low = _cut(blocks[:, place + 4 :], 4, 16).reshape(-1, 32)
    return low | (high << np.uint8(4))


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight of each in 6 bits, out of 12 bytes: [B, 8, 1] each.

    Bytes 0 to 3 hold four scales and, in their two high bits, the high bits of the other four; bytes 4 to 7 likewise
    the minima; bytes 8 to 11 the low bits of the other four scales and, above, minima.
    """
    first, second, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    low, four, two = np.uint8(63), np.uint8(15), np.uint8(48)
    scales = np.concatenate([first & low, (last & four) | ((first >> np.uint8(2)) & two)], axis=1)
    minima = np.concatenate([second & low, (last >> np.uint8(4)) | ((second >> np.uint8(2)) & two)], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _signed(_cut(blocks[:, 2:], 4, 16).reshape(-1, 32), 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _cut(blocks[:, 4:], 4, 16).reshape(-1, 32).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _signed(_fives(blocks, 2), 16)


def _q5_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _fives(blocks, 4).astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(blocks: Bytes) -> Floats:
    """16 scales (low) and minima (high) in 4 bits, 256 values in 2, then the scales' scale and the minima's."""
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & np.uint8(15)).astype(np.float32)
    minima = _half(blocks, 82) * (packed >> np.uint8(4)).astype(np.float32)
    values = _cut(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16).astype(np.float32)
    return scales[..., None] * values - minima[..., None]


def _q3_k(blocks: Bytes) -> Floats:
    """The third bits, 256 values' other two, 16 scales in 6 bits (the low four first), and the scales' scale.

    A third bit that is set means that 4 is not taken away.
    """
    low, high = _cut(blocks[:, 96:104], 4, 8).reshape(-1, 16), _cut(blocks[:, 104:108], 2, 4).reshape(-1, 16)
    scales = _half(blocks, 108) * _signed(low | (high << np.uint8(4)), 32)
    two = _cut(blocks[:, 32:96], 2, 32).reshape(-1, 16, 16)
    third = _cut(blocks[:, :32], 1, 32).reshape(-1, 16, 16)
    return scales[..., None] * _signed(two | (third << np.uint8(2)), 4)


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    values = _cut(blocks[:, 16:], 4, 32).reshape(-1, 8, 32).astype(np.float32)
    return _half(blocks, 0)[..., None] * scales * values - _half(blocks, 2)[..., None] * minima


def _q5_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    high = _cut(blocks[:, 16:48], 1, 32).reshape(-1, 8, 32)
    values = (_cut(blocks[:, 48:], 4, 32).reshape(-1, 8, 32) | (high << np.uint8(4))).astype(np.float32)
    return _half(blocks, 0)[..., None] * scales * values - _half(blocks, 2)[..., None] * minima


def _q6_k(blocks: Bytes) -> Floats:
    """The low four bits of 256 values, their high two, 16 scales in 8 bits, and the scales' scale."""
    low = _cut(blocks[:, :128], 4, 64).reshape(-1, 256)
    high = _cut(blocks[:, 128:192], 2, 32).reshape(-1, 256)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales[..., None] * _signed(low | (high << np.uint8(4)), 32).reshape(-1, 16, 16)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * LEVELS[_cut(blocks[:, 2:], 4, 16).reshape(-1, 32)]


def _iq4_xs(blocks: Bytes) -> Floats:
    """The scales' scale, the high two bits of 8 scales, their low four, and 256 values in 4 bits."""
    high, low = _cut(blocks[:, 2:4], 2, 1).reshape(-1, 8), _cut(blocks[:, 4:8], 4, 1).reshape(-1, 8)
    scales = _half(blocks, 0) * _signed(low | (high << np.uint8(4)), 32)
    return scales[..., None] * LEVELS[_cut(blocks[:, 8:], 4, 16).reshape(-1, 8, 32)]


FORMS: Mapping[str, Callable[[Bytes], NDArray[Any]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
