"""Layers of a network on a GPU that run on the fused kernels of `triton_layers`, where Triton is there.

They compute the same, with fewer roundings and passes over memory; `gpu_network` puts them in place of the plain ones.
Runs in the worker process.
"""

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.attend import CachedAttend
from model.attention.interface import Attend
from model.decoder import DecoderAttention
from model.layers import AddingNorm, Additions, GatedMLP, LayerNorm, RMSNorm, Rotation, gelu_tanh, project

triton_layers: ModuleType | None
one_row_attention: ModuleType | None
try:
    from model import triton_layers
    from model.attention import triton_one_row as one_row_attention
except ImportError:  # builds of torch for some platforms come without Triton
    triton_layers = one_row_attention = None

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

    def forward(self, x: Tensor, additions: Additions | None = None) -> Tensor:
        assert triton_layers is not None
        both = project(self.gate_up, "gate_up", x, additions)
        return project(self.down, "down", triton_layers.gated(both, self.activation), additions)


class FusedHeads:
    """Attention behind its projection (`AttendHeads`): heads are normed, turned and stored in one pass, and a single
    row's also attend in it."""

    def __init__(self, attention: DecoderAttention, arrived: Tensor) -> None:
        """`arrived`: zeros for a kernel to count in, one for each key head."""
        self.index = attention.index
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.rules = attention.rules
        self.norm: tuple[Tensor, Tensor, float, float] | None = None
        self._arrived = arrived
        kernels = one_row_attention
        served = kernels is not None and kernels.serves(self.rules, self.num_heads, self.num_kv_heads)
        self._one_row_kernel = kernels.attend_one_row if served and kernels is not None else None
        query, key = attention.query_norm, attention.key_norm
        if isinstance(query, RMSNorm) and isinstance(key, RMSNorm):
            self.norm = (query.weight, key.weight, query.epsilon, query.offset)

    def __call__(self, fused: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        assert triton_layers is not None
        turns = self.norm is not None or rotation is not None
        if isinstance(attend, CachedAttend) and fused.is_contiguous():
            caches = attend.cache.keys[self.index], attend.cache.values[self.index]
            if len(fused) == 1 and self._one_row_kernel is not None:
                attended: Tensor = self._one_row_kernel(
                    fused, rotation, self.norm, *caches, attend.layout, self.rules, self._arrived
                )
                return attended
            if turns:
                places = (*caches, attend.layout.slots)
                query = triton_layers.turn_and_store(fused, rotation, self.norm, self.num_heads, *places)
                return attend.backend.paged(query, *caches, attend.layout, self.rules)
        num_turned = self.num_heads + self.num_kv_heads
        query_key, value = fused[:, :num_turned], fused[:, num_turned:]
        if turns:
            query_key = triton_layers.turn_heads(query_key, rotation, self.norm, self.num_heads)
        return attend(self.index, query_key[:, : self.num_heads], query_key[:, self.num_heads :], value, self.rules)
