"""Layers of a network on a GPU that run on the fused kernels of `triton_layers`, where Triton is there.

They compute the same, with fewer roundings and passes over memory; `gpu_network` puts them in place of the plain ones.
Runs in the worker process.
"""

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import DecoderAttention
from model.layers import AddingNorm, GatedMLP, LayerNorm, RMSNorm, Rotation, gelu_tanh

triton_layers: ModuleType | None
try:
    from model import triton_layers
except ImportError:  # builds of torch for some platforms come without Triton
    triton_layers = None

ACTIVATION_NAMES = {F.silu: "silu", F.gelu: "gelu", gelu_tanh: "gelu_tanh"}


class FusedRMSNorm(AddingNorm):
    """x / rms(x) * (weight + offset), the sum before it included."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon = norm.epsilon
        self.offset = norm.offset

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[1]

    def add(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        assert triton_layers is not None
        found: tuple[Tensor, Tensor] = triton_layers.add_rms_norm(hidden, delta, self.weight, self.epsilon, self.offset)
        return found


class FusedLayerNorm(LayerNorm):
    """Layer normalization of a sum in one pass."""

    def __init__(self, norm: LayerNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.epsilon

    def of_sum(self, x: Tensor, delta: Tensor) -> Tensor:
        assert triton_layers is not None
        out: Tensor = triton_layers.add_layer_norm(x, delta, self.weight, self.bias, self.epsilon)
        return out


class FusedGatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), the middle in one pass."""

    def __init__(self, mlp: GatedMLP, activation: str) -> None:
        super().__init__()
        self.gate_up = mlp.gate_up
        self.down = mlp.down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        assert triton_layers is not None
        out: Tensor = self.down(triton_layers.gated(self.gate_up(x), self.activation))
        return out


class FusedTurn:
    """Norm and rotation of queries and keys."""

    def __init__(self, attention: DecoderAttention) -> None:
        self.num_heads = attention.num_heads
        self.norm: tuple[Tensor, Tensor, float, float] | None = None
        query, key = attention.query_norm, attention.key_norm
        if isinstance(query, RMSNorm) and isinstance(key, RMSNorm):
            self.norm = (query.weight, key.weight, query.epsilon, query.offset)

    def __call__(self, query_key: Tensor, rotation: Rotation | None) -> Tensor:
        if self.norm is None and rotation is None:
            return query_key
        assert triton_layers is not None
        turned: Tensor = triton_layers.turn_heads(query_key, rotation, self.norm, self.num_heads)
        return turned
