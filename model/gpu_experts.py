"""The sparse MLP on a GPU: a kind of projection of all experts is one tensor, and one grouped product a step.

Which rows are whose is known to the device alone, and nobody waits for it: a step with experts can be captured
(`model.cuda_graphs`). `gpu_network` puts it in place of one expert after another, where there are kernels for it. Runs
in the worker process.

Legend: R rows, each with one expert, E hidden size, F inner size, X experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.experts import Mixture, SparseMLP
from model.layers import Linear

CAPABILITIES = (9, 10)
"""Hopper and Blackwell, whose kernels read on the device where groups end. On others torch waits for the device."""
MULTIPLE = 8
"""Of which sizes must be multiples: 16 bytes."""


class GroupedMLP(Mixture):
    def __init__(self, mlp: SparseMLP, gate: Callable[[Tensor], Tensor]) -> None:
        """`gate` makes activation(gate) * up [R, F] of both, side by side [R, 2F]."""
        super().__init__()
        self.config = mlp.config
        self.router, self.selection_bias = mlp.router, mlp.selection_bias
        self.shared, self.shared_gate = mlp.shared, mlp.shared_gate
        self.gate_up = _stacked(mlp, "gate_up")  # [X, 2F, E]
        self.down = _stacked(mlp, "down")  # [X, E, F]
        self.gate = gate

    def made(self, x: Tensor, experts: Tensor) -> Tensor:
        numbers = torch.arange(len(self.down), device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        both = F.grouped_mm(x, self.gate_up.transpose(1, 2), offs=ends)
        made: Tensor = F.grouped_mm(self.gate(both), self.down.transpose(1, 2), offs=ends)
        return made


def _stacked(mlp: SparseMLP, projection: str) -> nn.Parameter:
    weights: list[Tensor] = [expert.get_parameter(f"{projection}.weight") for expert in mlp.experts]
    return nn.Parameter(torch.stack(weights), requires_grad=False)


def groups(mlp: SparseMLP) -> bool:
    """Whether there are kernels for these experts: not for those in 8 bits."""
    linears = [linear for expert in mlp.experts for linear in expert.children()]
    weights = [linear.weight for linear in linears if isinstance(linear, Linear)]
    fit = (weight.dtype == torch.bfloat16 and not any(size % MULTIPLE for size in weight.shape) for weight in weights)
    if len(weights) < len(linears) or not all(fit):
        return False
    device = weights[0].device
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in CAPABILITIES
