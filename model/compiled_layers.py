"""Layers of a bfloat16 network on a CPU that run on the compiled operators: weights packed once, in 8 or 4 bits too.

`compile_layers` replaces them in a network that has been filled; the network computes the same, in the operators'
order of additions. What has no operator stays as it is. Runs in the worker process.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import CheckpointError
from model.experts import SparseMLP
from model.fp8_linear import quantize_network, quantized
from model.huge_pages import Shelf
from model.layers import AddingNorm, Additions, GatedMLP, Linear, RMSNorm, project
from model.ops import library

Quantization = Literal["none", "int8", "int4", "fp8"]

SLICE = 4096
"""Outputs that are packed at a time; a multiple of those that are padded to."""
MULTIPLE = 32
"""Of which the inputs of experts must be multiples for the operator of all of them, and"""
MOST_CHOSEN = 64
"""how many of them a token may have."""


class CompiledLinear(nn.Module):
    """x W^T + b over packed weights. `wide` gives float32, for logits."""

    numbers: ClassVar[str] = "bf16"
    """What the weights are kept in, as the operators' names have it."""

    def __init__(self, linear: Linear, *, wide: bool = False, shelf: Shelf | None = None) -> None:
        """Where there is a `shelf`, the weights are packed onto it."""
        super().__init__()
        self.num_outputs: int
        self.num_inputs: int
        self.num_outputs, self.num_inputs = linear.weight.shape
        self.packed: Tensor
        self.packed, *self.factors = (
            self._pack(linear.weight) if shelf is None else self._pack_onto(shelf, linear.weight)
        )
        """`factors`: what else the operator takes of the weights."""
        self.bias = None if linear.bias is None else linear.bias.float()
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        multiply = getattr(torch.ops.slimpajama, f"linear_{self.numbers}")
        out: Tensor = multiply(rows, self.packed, *self.factors, self.bias, self.num_outputs, self.wide)
        return out.view(*x.shape[:-1], self.num_outputs)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.packed, *self.factors))

    @property
    def tensors(self) -> list[Tensor]:
        """As operators of several projections take them: packed weights, the two tensors at most that they have beside
        them, and bias, empty where there are none."""
        nothing = torch.empty(0)
        factors = [*self.factors, nothing, nothing][:2]
        return [self.packed, *factors, nothing if self.bias is None else self.bias]

    def _pack_onto(self, shelf: Shelf, weight: Tensor) -> tuple[Tensor, ...]:
        """In slices, so that what packing takes beside the weights is small."""
        first, *others = torch.split(weight, SLICE)
        part, *factors = self._pack(first)
        length = len(part) * _padded(len(weight)) // _padded(len(first))
        packed, all_factors, end = shelf.room((length, *part.shape[1:]), part.dtype), [factors], len(part)
        packed[:end] = part
        for rows in others:
            part, *factors = self._pack(rows)
            packed[end : end + len(part)] = part
            all_factors.append(factors)
            end += len(part)
        return packed, *(torch.cat(parts) for parts in zip(*all_factors, strict=True))

    def _pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = getattr(torch.ops.slimpajama, f"pack_{self.numbers}")(weight)
        return (found,) if isinstance(found, Tensor) else found


class Int8Linear(CompiledLinear):
    """The same with weights in 8 bits, symmetric per output, and inputs quantized per row on the way in."""

    numbers = "int8"


class Int4Linear(CompiledLinear):
    """The same with weights in 4 bits, symmetric with a scale for every 32 inputs of an output; inputs as for int8."""

    numbers = "int4"

    def _pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Raises: CheckpointError for weights that are not finite: their groups would be zeros, and nobody told."""
        if not math.isfinite(float(weight.abs().max())):
            raise CheckpointError("a weight is not finite, which 4 bits with a scale cannot tell")
        return super()._pack(weight)


def _padded(num_outputs: int) -> int:
    """As they are packed: in pairs of panels (`model/ops/output.h`)."""
    return -(-num_outputs // 32) * 32


LINEARS: dict[Quantization, type[CompiledLinear]] = {"none": CompiledLinear, "int8": Int8Linear, "int4": Int4Linear}


class CompiledRMSNorm(AddingNorm):
    """x / rms(x) * weight over the last dimension, the sum before it included."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon = norm.epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[1]

    def add(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum is made in `hidden`, which is the layer's own."""
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        more = None if delta is None else delta.reshape(rows.shape).contiguous()
        normed: Tensor = torch.ops.slimpajama.add_rms_norm(rows, more, self.weight, self.epsilon)
        return rows.view(hidden.shape), normed.view(hidden.shape)


class CompiledGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the middle in one pass."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        self.gate_up = mlp.gate_up
        self.down = mlp.down

    def forward(self, x: Tensor, additions: Additions | None = None) -> Tensor:
        both = project(self.gate_up, "gate_up", x, additions)
        return project(self.down, "down", torch.ops.slimpajama.silu_mul(both), additions)


def compiled_router(weight: Tensor) -> CompiledLinear:
    """weight [N, E], in 16 bits whatever else is packed in 8 or 4."""
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return CompiledLinear(linear, wide=True)


class CompiledSparseMLP(nn.Module):
    """All that a layer's experts make of a step in one operator, from the router's scores to the sum by shares."""

    def __init__(self, mlp: SparseMLP) -> None:
        super().__init__()
        self.config = mlp.config
        scores: list[Tensor] = [router.weight for router in (mlp.router, mlp.shared_gate) if router is not None]
        self.router = compiled_router(torch.cat(scores))
        self.selection_bias = mlp.selection_bias
        self.experts = nn.ModuleList(mlp for mlp in (*mlp.experts, mlp.shared) if mlp is not None)
        self.operator: Any = None

    def join(self) -> None:
        """Once the experts are packed."""
        config = self.config
        self.operator = torch.classes.slimpajama.Experts(
            config.num_chosen, config.scores == "sigmoid", config.normalized, config.scale,
            config.shared_size is not None, config.shared_gate,
        )  # fmt: skip
        for expert in self.experts:
            linears: list[Any] = [expert.gate_up, expert.down]
            tensors = [tensor for linear in linears for tensor in linear.tensors]
            sizes = ([getattr(linear, name) for linear in linears] for name in ("num_inputs", "num_outputs"))
            self.operator.add(tensors, *sizes)
        bias = torch.empty(0) if self.selection_bias is None else self.selection_bias
        self.operator.set_router(self.router.packed, bias)

    def forward(self, x: Tensor, _: Additions | None = None) -> Tensor:
        out: Tensor = self.operator.run(x.contiguous())
        return out


class Packing:
    """Packs a network's projections one at a time, so that their plain weights can go: while it is read, or afterwards.
    What they become lies side by side in huge pages."""

    def __init__(self, quantization: Quantization = "none") -> None:
        self._quantization = quantization
        self._shelf = Shelf()

    def packed(self, linear: Linear, *, wide: bool = False) -> nn.Module:
        """What takes a filled projection's place; itself, where nothing does. `wide` if its results are wanted in
        float32: the logits, which are least sure of few bits. For int4 they get int8, for fp8 they stay.

        Raises: CheckpointError if a quantization is asked for that the device or dtype does not have.
        """
        if self._quantization == "fp8":
            return linear if wide else quantized(linear)
        if not library.serves(linear.weight):
            return linear
        kind = Int8Linear if wide and self._quantization == "int4" else LINEARS[self._quantization]
        return kind(linear, wide=wide, shelf=self._shelf)


def compile_layers(network: nn.Module, quantization: Quantization = "none", *, wide: nn.Module | None = None) -> None:
    """Replaces the layers that have a compiled form, and projections that are not packed yet; `wide` is the one whose
    results are wanted in float32.

    Raises: CheckpointError if a quantization is asked for that the device or dtype does not have.
    """
    if quantization == "fp8":
        quantize_network(network, kept=wide)
        return
    usable = any(
        isinstance(module, CompiledLinear) or (isinstance(module, Linear) and library.serves(module.weight))
        for module in network.modules()
    )
    if quantization != "none" and not usable:
        raise CheckpointError(
            f"quantization {quantization} is not to be had here: {quantization} needs a CPU, dtype bfloat16 and the "
            "compiled operators (`make install` builds them where there is a C++ compiler)"
        )
    if not usable:
        return
    _compile_experts(network)
    packing = Packing(quantization)
    # The list holds no projections: each one's plain weights go as soon as they are packed.
    for module in [module for module in network.modules() if not isinstance(module, Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                module.add_module(name, packing.packed(child, wide=child is wide))
            elif isinstance(child, RMSNorm) and library.serves(child.weight) and child.offset == 0.0:
                module.add_module(name, CompiledRMSNorm(child))
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GatedMLP) and child.activation is F.silu and _is_packed(child.gate_up):
                module.add_module(name, CompiledGatedMLP(child))
    for sparse in [module for module in network.modules() if isinstance(module, CompiledSparseMLP)]:
        sparse.join()


def _is_packed(projection: nn.Module) -> bool:
    return isinstance(projection, CompiledLinear)


def _compile_experts(network: nn.Module) -> None:
    """Puts the place of the operator around experts that it takes, which are still to be packed."""
    for module in list(network.modules()):
        for name, mlp in list(module.named_children()):
            if not isinstance(mlp, SparseMLP) or not library.serves(mlp.router.weight):
                continue
            if _joins(mlp):
                module.add_module(name, CompiledSparseMLP(mlp))
                continue
            mlp.add_module("router", compiled_router(mlp.router.weight))
            if mlp.shared_gate is not None:
                mlp.add_module("shared_gate", compiled_router(mlp.shared_gate.weight))


def _joins(mlp: SparseMLP) -> bool:
    config, hidden_size = mlp.config, mlp.router.weight.shape[1]
    sizes = (hidden_size, config.intermediate_size, config.shared_size or MULTIPLE)
    usual = mlp.activation is F.silu and config.num_chosen <= MOST_CHOSEN
    return usual and not any(size % MULTIPLE for size in sizes)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights, those that modules share counted once, packed ones included."""
    parameters = {parameter.data_ptr(): parameter for parameter in network.parameters()}
    plain = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    return plain + sum(int(getattr(module, "num_bytes", 0)) for module in network.modules())
