"""The parts that the networks share: projections, norms, embeddings, rotary and ALiBi positions, activations.

Parameters are made on the meta device and filled by `model.checkpoint`; nothing here is trained. Every projection is a
`Linear`, so that a packed or quantized kernel can take its place. Knows no architecture; runs in the worker process.

Legend: T tokens, E hidden size, H heads, D head size, R rotated dimensions of a head, P positions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DecoderActivation, Rotary, RotaryScaling
from model.ops import library

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines of a step's positions, each [T, 1, R], in the dtype of queries and keys."""

Device = torch.device | str


class Additions(Protocol):
    """What is added to the projections of a layer beside their own results: adapters', for some rows of the step."""

    def add(self, projection: str, x: Tensor, out: Tensor) -> Tensor:
        """Gives back `out`, what the projection of that name made of x, which may have been written to."""
        ...


def project(projection: Callable[[Tensor], Tensor], name: str, x: Tensor, additions: Additions | None) -> Tensor:
    out = projection(x)
    return out if additions is None else additions.add(name, x, out)


def parameter(*shape: int) -> nn.Parameter:
    """A parameter still to be filled."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """x W^T + b, with W stored [out, in]."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(out_size, in_size)
        self.bias = parameter(out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A row of `weight` for each id."""

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = parameter(num_rows, size)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset) over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, epsilon: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.epsilon = epsilon
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset == 0.0:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        # 1 + w is not representable in bfloat16 for the small w that such checkpoints store.
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), weight.shape, weight, self.epsilon).to(x.dtype)


class AddingNorm(nn.Module, ABC):
    """A norm whose kernel takes the sum that comes before it along."""

    @abstractmethod
    def add(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden + delta, and that normed."""


class LayerNorm(nn.Module):
    """Layer normalization (arXiv 1607.06450), with or without a bias."""

    def __init__(self, size: int, epsilon: float, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.bias = parameter(size) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)

    def of_sum(self, x: Tensor, delta: Tensor) -> Tensor:
        """The sum normed; kernels that take both in one pass override this."""
        out: Tensor = self(x + delta)
        return out


class OffsetLayerNorm(LayerNorm):
    """Layer normalization with weight + offset, computed in float32."""

    def __init__(self, size: int, epsilon: float, *, bias: bool, offset: float) -> None:
        super().__init__(size, epsilon, bias=bias)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.epsilon).to(x.dtype)


class PlainLayerNorm(nn.Module):
    """Layer normalization that has learned nothing, computed in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.size = size
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (self.size,), eps=self.epsilon).to(x.dtype)


class HeadsLayerNorm(nn.Module):
    """Layer normalization of each head of [T, H, D], with a weight of its own, computed in float32."""

    def __init__(self, num_heads: int, head_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = parameter(num_heads * head_size)
        self.head_size = head_size
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), (self.head_size,), eps=self.epsilon)
        return (normed * self.weight.view(-1, self.head_size).float()).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """Arxiv 2109.08668."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[DecoderActivation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu_squared": relu_squared,
}


class XIELU(nn.Module):
    """The expanded integral of the exponential linear unit, with trained slopes (arXiv 2411.13010)."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = parameter(1), parameter(1)
        """Slopes before softplus, which keeps them above 0 (`negative` above `beta`)."""
        self.beta, self.epsilon = parameter(1), parameter(1)

    def forward(self, x: Tensor) -> Tensor:
        above = F.softplus(self.positive) * x * x
        below = (torch.expm1(torch.minimum(x, self.epsilon)) - x) * (self.beta + F.softplus(self.negative))
        return torch.where(x > 0, above, below) + self.beta * x


def make_activation(name: DecoderActivation) -> Callable[[Tensor], Tensor]:
    return XIELU() if name == "xielu" else ACTIVATIONS[name]


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: DecoderActivation, bias: bool) -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = make_activation(activation)
        self.up_alone: Callable[[Tensor], Tensor] | None = None
        """What `up` does before the activation, where it applies that, too (`model.packed_linear`)."""

    def forward(self, x: Tensor, additions: Additions | None = None) -> Tensor:
        if self.up_alone is not None and additions is None:
            middle: Tensor = self.up(x)
        else:
            middle = self.activation(project(self.up_alone or self.up, "up", x, additions))
        return project(self.down, "down", middle, additions)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202); gate and up are one projection, gate first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: DecoderActivation,
        bias: bool,
        down_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias if down_bias is None else down_bias)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor, additions: Additions | None = None) -> Tensor:
        gate, up = project(self.gate_up, "gate_up", x, additions).chunk(2, dim=-1)
        return project(self.down, "down", self.activation(gate) * up, additions)


class RotaryTable:
    """Cosines and sines of every position, looked up once per step and shared by all layers.

    Not a module: the table stays float32 whatever the network's dtype is.
    """

    def __init__(self, rotary: Rotary, length: int, device: Device) -> None:
        frequencies, factor = rotary_frequencies(rotary)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies  # [P, R / 2]
        self.table = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1).to(device)  # [P, R]

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        cos, sin = self.rows(positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, R / 2] each
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def rows(self, positions: Tensor) -> Tensor:
        """positions [T]; returns float32 [T, R]."""
        return self.table[positions]


class OwnStretchTable(RotaryTable):
    """Positions of the kind "dynamic" for texts that are there whole: one past the trained length is stretched to its
    own, the others not at all."""

    def __init__(self, rotary: Rotary, device: Device) -> None:
        assert rotary.scaling is not None
        self.rotary, self.scaling = rotary, rotary.scaling
        super().__init__(self._stretched_to(rotary.scaling.original_length), self.scaling.original_length, device)

    def rows(self, positions: Tensor) -> Tensor:
        trained = self.scaling.original_length
        found = self.table[positions.clamp(max=trained - 1)]
        starts = torch.nonzero(positions == 0).flatten().tolist()
        for start, end in pairwise([*starts, len(positions)]):
            if end - start > trained:
                found[start:end] = RotaryTable(self._stretched_to(end - start), end - start, found.device).table
        return found

    def _stretched_to(self, length: int) -> Rotary:
        return replace(self.rotary, scaling=replace(self.scaling, length=length))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the first R dimensions of each head of x [T, H, D]; dimension i is paired with i + R / 2.

    Worked example, R = 4: (a, b, c, d) becomes (a cos - c sin, b cos' - d sin', c cos + a sin, d cos' + b sin').
    """
    cos, sin = rotation
    if library.serves(x) and x.stride(1) == x.shape[2]:
        # In place: queries and keys are a view of their projection, which nobody else reads.
        torch.ops.slimpajama.rotate(x, cos, sin)
        return x
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(size // 2, dims=-1), sin)
    turned, kept = x[..., :size], x[..., size:]
    return torch.cat((torch.addcmul(turned * cos, turned.roll(size // 2, dims=-1), sin), kept), dim=-1)


def rotary_frequencies(rotary: Rotary) -> tuple[Tensor, float]:
    """Angle per position of each of the R / 2 pairs, float32, and the factor on cosines and sines."""
    exponents = torch.arange(0, rotary.size, 2, dtype=torch.float32) / rotary.size
    scaling = rotary.scaling
    if scaling is None:
        return 1.0 / rotary.theta**exponents, 1.0
    if scaling.kind == "dynamic":
        return _dynamic(rotary, scaling, exponents), 1.0
    frequencies = 1.0 / rotary.theta**exponents
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(scaling, frequencies), 1.0
    if scaling.kind == "yarn":
        return _yarn(rotary, scaling, frequencies), scaling.attention_factor
    return frequencies / torch.tensor(scaling.factors, dtype=torch.float32), scaling.attention_factor


def _dynamic(rotary: Rotary, scaling: RotaryScaling, exponents: Tensor) -> Tensor:
    """NTK-aware scaling: a larger base, so that the longest sequence fits (reddit.com/r/LocalLLaMA, 14mrgpr)."""
    stretch = scaling.factor * scaling.length / scaling.original_length - (scaling.factor - 1)
    theta: float = rotary.theta * stretch ** (rotary.size / (rotary.size - 2))
    frequencies: Tensor = 1.0 / theta**exponents
    return frequencies


def _llama3(scaling: RotaryScaling, frequencies: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1's reference code)."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(rotary: Rotary, scaling: RotaryScaling, frequencies: Tensor) -> Tensor:
    """Pairs that turn often are kept, those that turn seldom slowed, a linear ramp between (arXiv 2309.00071)."""

    def pair_turning(times: float) -> float:
        length = scaling.original_length
        return rotary.size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.size - 1)
    ramp = (torch.arange(rotary.size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return frequencies * (slowed / scaling.factor + 1 - slowed)


def alibi_slopes(num_heads: int) -> Tensor:
    """[H] float32: 2^(-8 h / H), or the paper's way out where H is no power of two (arXiv 2108.12409).

    Worked example, 6 heads: the 4 slopes of 4 heads (1/4, 1/16, 1/64, 1/256), then every second one of 8 heads
    (1/2, 1/8).
    """
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / whole) for head in range(whole)]
    between = [2.0 ** (-4.0 * (head + 1) / whole) for head in range(0, 2 * whole, 2)]
    return torch.tensor((slopes + between)[:num_heads], dtype=torch.float32)
