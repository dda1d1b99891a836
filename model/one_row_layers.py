"""Decoder layers on a GPU when a step has a single row: fused kernels that read the weights and do little else.

Only the common kind of layer is served: RMSNorms before, a gated MLP, plain weights. Steps of more rows run as the
layer itself does. Runs in the worker process.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from model.adapters.low_rank import StepAdapters
from model.attention.interface import Attend
from model.decoder import Decoder, DecoderLayer
from model.gpu_layers import FusedGatedMLP, FusedRMSNorm
from model.layers import Linear, Rotation

triton_one_row: ModuleType | None
try:
    from model import triton_one_row
except ImportError:  # builds of torch for some platforms come without Triton
    triton_one_row = None


@dataclass(frozen=True, slots=True)
class _Parts:
    """The pieces of a layer of the served kind."""

    attention_norm: FusedRMSNorm
    query_key_value: Linear
    output: Linear
    mlp_norm: FusedRMSNorm
    mlp: FusedGatedMLP
    gate_up: Linear
    down: Linear


class OneRowLayer(nn.Module):
    """A layer, and its short cut for one row."""

    def __init__(self, layer: DecoderLayer, parts: _Parts) -> None:
        super().__init__()
        self.layer = layer
        self._parts = parts

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        rotations: list[Rotation],
        attend: Attend,
        adapters: StepAdapters | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `DecoderLayer`."""
        if hidden.shape[0] != 1 or adapters is not None:
            found: tuple[Tensor, Tensor] = self.layer(hidden, delta, rotations, attend, adapters)
            return found
        kernels, parts = triton_one_row, self._parts
        assert kernels is not None
        hidden, fused = kernels.norm_project(
            hidden, delta, _norm(parts.attention_norm), parts.query_key_value.weight, parts.query_key_value.bias
        )
        attended = self.layer.attention.attended(fused, rotations, attend).flatten(1)
        moved = self.layer.scaled(kernels.project(attended, parts.output.weight, parts.output.bias))
        hidden, middle = kernels.norm_project(
            hidden, moved, _norm(parts.mlp_norm), parts.gate_up.weight, parts.gate_up.bias, gate=parts.mlp.activation
        )
        return hidden, self.layer.scaled(kernels.project(middle, parts.down.weight, parts.down.bias))


def add_short_cuts(network: Decoder) -> None:
    """Wraps the layers that are of the served kind, once their own kernels are in place (`gpu_layers`)."""
    for index, layer in enumerate(network.layers):
        if isinstance(layer, DecoderLayer) and (parts := _parts(layer)) is not None:
            network.layers[index] = OneRowLayer(layer, parts)


def _parts(layer: DecoderLayer) -> _Parts | None:
    if triton_one_row is None or layer.parallel_residual:
        return None
    if layer.attention_output_norm is not None or layer.mlp_output_norm is not None:
        return None
    # As modules: the fused ones have taken the places of those that the layer was made with.
    first: nn.Module | None = layer.attention_norm
    second: nn.Module | None = layer.mlp_norm
    mlp: nn.Module = layer.mlp
    if not (isinstance(first, FusedRMSNorm) and isinstance(second, FusedRMSNorm) and isinstance(mlp, FusedGatedMLP)):
        return None
    linears = layer.attention.query_key_value, layer.attention.output, mlp.gate_up, mlp.down
    plain = [linear for linear in linears if isinstance(linear, Linear) and linear.weight.is_contiguous()]
    if len(plain) < len(linears) or first.weight.numel() > triton_one_row.MAX_NORMED:
        return None
    query_key_value, output, gate_up, down = plain
    return _Parts(first, query_key_value, output, second, mlp, gate_up, down)


def _norm(norm: FusedRMSNorm) -> tuple[Tensor, float, float]:
    return norm.weight, norm.epsilon, norm.offset
