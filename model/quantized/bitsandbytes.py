"""bitsandbytes: LLM.int8() (arXiv 2208.07339) and the 4-bit floats of QLoRA (arXiv 2305.14314), nested scales too.

8 bits: W = q * SCB / 127, one SCB for each output. 4 bits: two values to a byte, the first in the higher half, each an
index into `quant_map`, scaled by the `absmax` of its block of consecutive values; a nested `absmax` is stored in the
same way, in 8 bits, less the mean (`nested_offset`). Shape and block sizes are JSON in a tensor, as `QuantState` in
bitsandbytes' `functional.py` writes it. Runs in the worker process.
"""

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.architectures.raw import RawConfig
from model.quantized.config import CHANNEL
from model.quantized.grids import Shape, dequantize
from model.quantized.parts import Parts

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
STORAGE = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Types that the bytes of packed values are stored as, and how many of them each holds (`bnb_4bit_quant_storage`)."""
LARGEST = 127
NUM_LEVELS, NUM_NESTED_LEVELS = 16, 256


class BitsAndBytesFormat:
    parts = (
        "weight",
        "SCB",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *STATES,
    )

    def shape(self, parts: Parts) -> Shape:
        if _in_8_bits(parts):
            shape = parts.check("weight", ("I8",))
            parts.check_grid("SCB", ("F32",), shape, CHANNEL)
            return shape
        state = _read_state(parts)
        _check_4_bits(parts, state)
        return state.shape

    def weight(self, parts: Parts) -> Tensor:
        shape = self.shape(parts)
        if _in_8_bits(parts):
            return dequantize(parts.tensor("weight"), parts.grid("SCB", shape, CHANNEL) / LARGEST, 0, CHANNEL)
        state = _read_state(parts)
        octets = parts.tensor("weight").reshape(-1).view(torch.uint8)
        indices = torch.stack((octets >> 4, octets & 15), 1).flatten()[: math.prod(shape)]
        return _scaled(parts.tensor("weight.quant_map"), indices, _absmax(parts, state), state.block_size).view(shape)


@dataclass(frozen=True, slots=True)
class State:
    """What the JSON beside a weight in 4 bits says."""

    shape: Shape
    block_size: int
    nested_block_size: int | None
    nested_offset: float

    @property
    def num_blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)


def _in_8_bits(parts: Parts) -> bool:
    return "SCB" in parts or ("weight" in parts and parts.headers["weight"].kind == "I8")


def _read_state(parts: Parts) -> State:
    name = next((name for name in STATES if name in parts), STATES[0])
    parts.check_kind(name, ("U8",))
    try:
        found = json.loads(bytes(parts.tensor(name).flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise parts.refused(name, f"holds no JSON: {error}") from error
    if not isinstance(found, dict):
        raise parts.refused(name, "holds no JSON object")
    values = RawConfig(found, f"{parts.module}.{name}")
    shape = values.sizes("shape")
    if len(shape) != 2:
        raise parts.refused(name, f"names the shape {list(shape)}; a matrix has two dimensions")
    nested = "nested_blocksize" in values
    return State(
        shape=shape,
        block_size=values.size("blocksize"),
        nested_block_size=values.size("nested_blocksize") if nested else None,
        nested_offset=values.number("nested_offset") if nested else 0.0,
    )


def _check_4_bits(parts: Parts, state: State) -> None:
    num_octets = -(-math.prod(state.shape) // 2)
    kind = parts.check_kind("weight", STORAGE)
    parts.check("weight", (kind,), (num_octets // STORAGE[kind], 1))
    parts.check("weight.quant_map", ("F32",), (NUM_LEVELS,))
    if state.nested_block_size is None:
        parts.check("weight.absmax", ("F32",), (state.num_blocks,))
        return
    parts.check("weight.absmax", ("U8",), (state.num_blocks,))
    parts.check("weight.nested_absmax", ("F32",), (-(-state.num_blocks // state.nested_block_size),))
    parts.check("weight.nested_quant_map", ("F32",), (NUM_NESTED_LEVELS,))


def _absmax(parts: Parts, state: State) -> Tensor:
    """[num_blocks], float32"""
    absmax = parts.tensor("weight.absmax")
    if state.nested_block_size is None:
        return absmax
    levels, scales = parts.tensor("weight.nested_quant_map"), parts.tensor("weight.nested_absmax")
    return _scaled(levels, absmax, scales, state.nested_block_size) + state.nested_offset


def _scaled(levels: Tensor, indices: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """levels[indices], each times the scale of its block of consecutive ones."""
    values = levels[indices.int()]
    values *= scales.repeat_interleave(block_size)[: len(values)]
    return values
