"""Projections with weights and inputs in 8-bit floating point (e4m3, arXiv 2209.05433), for GPUs that multiply these.

Weights are quantized once, each output by its own scale; inputs on the way in, each row by its own: nothing is
calibrated, and a row does not depend on its company. Half the bytes of bfloat16, twice the rate of its matrix units.
Runs in the worker process.

Legend: T rows, N outputs, K inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.errors import CheckpointError
from model.layers import Linear

Quantize = Callable[[Tensor, torch.dtype, float, float], tuple[Tensor, Tensor]]
triton_quantize: Quantize | None
try:
    from model.triton_layers import quantize_rows as triton_quantize
except ImportError:  # builds of torch for some platforms come without Triton
    triton_quantize = None

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
LEAST_SCALE = 1e-12
"""For rows of zeros."""
MULTIPLE = 16
"""Of which sizes must be multiples for the matrix units."""
LEAST_CAPABILITY = (9, 0)


class Fp8Linear(nn.Module):
    """x W^T + b with W in 8 bits."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight, scales = quantize_rows(linear.weight)
        self.weight: Tensor = weight  # [N, K]
        self.scales: Tensor = scales.t().contiguous()  # [1, N]
        self.bias = linear.bias
        self.num_bytes = weight.numel() + scales.numel() * scales.element_size()

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        out: Tensor = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return out.view(*x.shape[:-1], len(self.weight))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] in e4m3, and the float32 scales [T, 1] by which it is to be multiplied again."""
    if x.device.type == "cuda" and triton_quantize is not None:
        return triton_quantize(x, DTYPE, LARGEST, LEAST_SCALE)
    wide = x.float()
    scales = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp(min=LEAST_SCALE)
    return (wide / scales).clamp(-LARGEST, LARGEST).to(DTYPE), scales


def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device cannot, or None."""
    if device.type != "cuda":
        return f"fp8 needs a GPU; this checkpoint is on {device.type} (where int8 is the choice)"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"fp8 needs a GPU of compute capability {least} (Hopper) or later; this one has {found}"
    if dtype != torch.bfloat16:
        return f"fp8 needs dtype bfloat16 for what is not quantized; this checkpoint's is {str(dtype)[6:]}"
    return None


def quantize_network(network: nn.Module, *, kept: nn.Module | None = None) -> None:
    """Replaces every `Linear` but `kept` (the projection to logits, whose errors would be the most visible).

    Raises: CheckpointError where the device or the dtype does not do it, or nothing has sizes that can be quantized.
    """
    linears = [module for module in network.modules() if isinstance(module, Linear) and module is not kept]
    for linear in linears[:1]:
        _check(linear)
    del linears
    convert(network, kept=kept)
    if not any(isinstance(module, Fp8Linear) for module in network.modules()):
        raise CheckpointError(f"fp8 needs projections whose sizes are multiples of {MULTIPLE}; there are none here")


def quantized(linear: Linear) -> nn.Module:
    """What takes its place; itself, where its sizes are not of the matrix units.

    Raises: CheckpointError where the device or the dtype does not do it.
    """
    _check(linear)
    return Fp8Linear(linear) if _fits(linear) else linear


def convert(network: nn.Module, *, kept: nn.Module | None = None) -> int:
    """The replacing itself, on any device; how many were."""
    count = 0
    # The list holds no projections: each one's plain weights go as soon as they are quantized.
    for module in [module for module in network.modules() if not isinstance(module, Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and child is not kept and _fits(child):
                module.add_module(name, Fp8Linear(child))
                count += 1
    return count


def _fits(linear: Linear) -> bool:
    return not any(size % MULTIPLE for size in linear.weight.shape)


def _check(linear: Linear) -> None:
    found = fault(linear.weight.device, linear.weight.dtype)
    if found is not None:
        raise CheckpointError(found)
