"""Projections with their weights packed once for the CPU's matrix kernels (oneDNN), activation included.

`Linear` hands PyTorch its weights as they are stored, to be rearranged in every call; packed they multiply from a fifth
(hundreds of rows) to three times (eight rows) faster. A packed network computes the same, can't be saved and stays on
the CPU. Runs in the worker process.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import MLP, Linear, gelu_tanh
from model.ops import library

_FUSED = {F.gelu: ("gelu", "none"), gelu_tanh: ("gelu", "tanh"), F.relu: ("relu", ""), F.silu: ("swish", "")}
"""Activations that the kernel applies to a tile while it is in cache, as it names them."""


class PackedLinear(nn.Module):
    """A `Linear` after `pack`; the packed weight is no parameter, for it has no strides and no address."""

    def __init__(self, linear: Linear, activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.num_bytes = linear.weight.numel() * linear.weight.element_size()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, *self.activation)

    def alone(self, x: Tensor) -> Tensor:
        """Without the activation."""
        return self._multiply(x, "none", "")

    def _multiply(self, x: Tensor, name: str, algorithm: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return out


def pack(network: nn.Module, *, kept: nn.Module | None = None) -> None:
    """Replaces every `Linear` of a CPU network but `kept` by its packed form, where this processor has kernels for its
    dtype."""
    # The list holds no projections: each one's plain weights go as soon as they are packed.
    for module in [module for module in network.modules() if not isinstance(module, Linear)]:
        if isinstance(module, MLP) and module.activation in _FUSED and _packable(module.up):
            packed = PackedLinear(module.up, _FUSED[module.activation])
            module.add_module("up", packed)
            module.up_alone = packed.alone
        for name, child in list(module.named_children()):
            if child is not kept and _packable(child):
                module.add_module(name, PackedLinear(child))


def _packable(module: nn.Module) -> TypeGuard[Linear]:
    if not isinstance(module, Linear) or module.weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if module.weight.dtype == torch.bfloat16:
        return library.torch_has_bfloat16()
    return module.weight.dtype == torch.float32
