"""A decoder's layers as one compiled operator: those of Llama, Mistral, Qwen and their like in bfloat16 on a CPU.

`join_layers` puts it in the place of the layers, after `compile_layers` has packed their weights; the results are the
same, to a bit. Other decoders stay as they are, and where the cache has blocks of unusual sizes the layers run one by
one. Runs in the worker process.

Legend: T tokens of the step, E hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.adapters.low_rank import AdapterWeights, PackedLowRank, StepAdapters
from model.attention.attend import CachedAttend
from model.attention.interface import Attend
from model.compiled_layers import CompiledGatedMLP, CompiledLinear, CompiledRMSNorm, CompiledSparseMLP
from model.config import DecoderConfig
from model.decoder import Decoder, DecoderLayer
from model.layers import Rotation
from model.ops import library

PROJECTIONS = ("query_key_value", "output", "gate_up", "down")
USUAL_BLOCK = 16
"""Tokens of a KV block that the operator takes, as it does all multiples."""


class JoinedLayers(nn.Module):
    """Stands for all layers of a network that attends to the paged cache."""

    def __init__(self, config: DecoderConfig, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self._sizes: list[tuple[list[int], list[int]]] = []
        """Inputs and outputs of each layer's four projections, the last two of which one with experts does not have."""
        self._head_size = config.head_size
        self._operator: Any = torch.classes.slimpajama.DecoderLayers(
            config.num_heads, config.num_kv_heads, config.attention_scale, config.norm_epsilon, config.residual_scale
        )
        for index, layer in enumerate(layers):
            linears = _linears(layer)
            tensors = [tensor for linear in linears for tensor in linear.tensors]
            norms = [torch.empty(0) if norm is None else norm.weight for norm in _norms(layer)]
            inputs, outputs = ([getattr(linear, name) for linear in linears] for name in ("num_inputs", "num_outputs"))
            rules = config.window(index) or 0, config.rotates(index)
            if isinstance(layer.mlp, CompiledSparseMLP):
                self._operator.add_sparse(tensors + norms, inputs, outputs, *rules, layer.mlp.operator)
            else:
                self._operator.add(tensors + norms, inputs, outputs, *rules)
            missing = [0] * (len(PROJECTIONS) - len(linears))
            self._sizes.append((inputs + missing, outputs + missing))

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        rotations: list[Rotation],
        attend: Attend,
        adapters: StepAdapters | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As a layer has it, but for `delta`: before the first layer there is none."""
        assert isinstance(attend, CachedAttend)
        assert delta is None
        if not library.attends(attend.cache.block_size, self._head_size):
            for layer in self.layers:
                hidden, delta = layer(hidden, delta, rotations, attend, adapters)
            assert delta is not None
            return hidden, delta
        layout = attend.layout
        runs = [] if adapters is None else adapters.runs
        found: tuple[Tensor, Tensor] = self._operator.run(
            hidden, *rotations[0], attend.cache.pool, layout.slots, layout.block_tables, layout.query_starts,
            layout.context_lens, [self._joined(run.weights) for run in runs],
            [bound for run in runs for bound in (run.begin, run.end)],
        )  # fmt: skip
        return found

    def _joined(self, weights: AdapterWeights) -> Any:
        """An adapter as the operator takes it."""
        if weights.joined is None:
            weights.joined = torch.classes.slimpajama.LowRankLayers()
            for index, (inputs, outputs) in enumerate(self._sizes):
                weights.joined.add(_low_rank_tensors(weights, index), inputs, outputs)
        return weights.joined


def join_layers(network: Decoder) -> None:
    """Joins the network's layers if they are of the kind that the operator has, and compiled."""
    if _is_usual(network.config) and all(map(_is_compiled, network.layers)):
        network.layers = nn.ModuleList([JoinedLayers(network.config, network.layers)])


def _low_rank_tensors(weights: AdapterWeights, layer: int) -> list[Tensor]:
    """Packed A and B beside each of `_linears`, empty where there are none."""
    products = weights.layers.get(layer, {})
    assert products.keys() <= set(PROJECTIONS)
    tensors: list[Tensor] = []
    for name in PROJECTIONS:
        found = products.get(name)
        assert found is None or isinstance(found, PackedLowRank), "the network's dtype is the adapter's"
        tensors += [torch.empty(0), torch.empty(0)] if found is None else [found.a, found.b]
    return tensors


def _is_usual(config: DecoderConfig) -> bool:
    """Whether the network is Llama's but for sizes, biases, windows, norms of the heads and scales."""
    unusual = (
        config.parallel_residual,
        config.local_rotary,
        config.attention_softcap,
        config.query_key_norm in ("heads", "full"),
        config.turned_norm,
        config.query_growth,
        config.query_key_value_clip is not None,
    )
    usual = (config.norm, config.norm_places, config.positions) == ("rms", "before", "rotary") and config.causal
    return usual and library.attends(USUAL_BLOCK, config.head_size) and not any(unusual)


def _is_compiled(layer: nn.Module) -> bool:
    if not isinstance(layer, DecoderLayer) or not isinstance(layer.mlp, CompiledGatedMLP | CompiledSparseMLP):
        return False
    linears = all(isinstance(linear, CompiledLinear) for linear in _linears(layer))
    whole = linears and all(linear.num_inputs % 32 == 0 for linear in _linears(layer))
    return whole and all(norm is None or isinstance(norm, CompiledRMSNorm) for norm in _norms(layer))


def _norms(layer: Any) -> list[Any]:
    """Before attention and MLP, and of the heads of queries and keys, which not all networks have."""
    return [layer.attention_norm, layer.mlp_norm, layer.attention.query_norm, layer.attention.key_norm]


def _linears(layer: Any) -> list[Any]:
    """Those of `PROJECTIONS` that a layer has: experts are an operator of their own."""
    mlp = [] if isinstance(layer.mlp, CompiledSparseMLP) else [layer.mlp.gate_up, layer.mlp.down]
    return [layer.attention.query_key_value, layer.attention.output, *mlp]
