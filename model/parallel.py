"""Tensor parallelism: a decoder's projections divided over the ranks of a `torch.distributed` process group.

As in arXiv 1909.08053: what makes heads and the MLP's inner values is divided by its outputs, what comes back from them
by its inputs, so that a layer has two sums over the ranks and nothing else; embeddings, norms and logits are whole on
every rank. Every rank has a part of each expert, and chooses the same ones. Knows the names of a decoder's parameters,
nothing of processes. Runs in every rank's worker process.

Legend: H query heads, K key/value heads, D head size, E hidden size, F intermediate size.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import DecoderConfig
from model.decoder import Decoder, DecoderLayer
from model.errors import CheckpointError
from model.experts import SparseMLP
from model.layers import Additions, Linear


class SummedLinear(nn.Module):
    """A projection of which each rank holds a part of the inputs; the bias is added once, to the sum."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        linear.bias = None
        self.projection: nn.Module = linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(x).contiguous()
        dist.all_reduce(out)
        return out if self.bias is None else out + self.bias


class SummedMLP(nn.Module):
    """A sparse MLP of whose experts each rank holds a part: what they make is summed once, by their shares."""

    def __init__(self, mlp: SparseMLP) -> None:
        super().__init__()
        self.mlp: nn.Module = mlp

    def forward(self, x: Tensor, additions: Additions | None = None) -> Tensor:
        out: Tensor = self.mlp(x, additions).contiguous()
        dist.all_reduce(out)
        return out


@dataclass(frozen=True, slots=True)
class Division:
    """One rank's part of a decoder. Raises CheckpointError if it cannot be divided so."""

    config: DecoderConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        config, experts = self.config, self.config.experts
        plain = experts is None or len(experts.layers) < config.num_layers
        for what, count in (
            ("query heads", config.num_heads),
            ("key/value heads", config.num_kv_heads),
            ("inner values of the MLP", config.intermediate_size if plain else 0),
            ("inner values of an expert", 0 if experts is None else experts.intermediate_size),
            ("inner values of the shared expert", 0 if experts is None else experts.shared_size or 0),
        ):
            if count % self.size:
                raise CheckpointError(f"{count} {what} cannot be divided over {self.size} ranks")
        if config.query_key_norm == "full":
            raise CheckpointError(f"{config.architecture} norms all heads together: they cannot be divided over ranks")

    @property
    def divided(self) -> DecoderConfig:
        """The network that this rank runs."""
        experts = self.config.experts
        return replace(
            self.config,
            num_heads=self.config.num_heads // self.size,
            num_kv_heads=self.config.num_kv_heads // self.size,
            intermediate_size=self.config.intermediate_size // self.size,
            experts=None if experts is None else experts.divided(self.size),
        )

    def part(self, name: str, values: Tensor) -> Tensor:
        """What this rank keeps of a whole parameter.

        Worked example, 4 query and 2 key/value heads of size 8 on 2 ranks: of the 64 rows of the first projection rank
        1 keeps 16..31 (queries), 40..47 (keys) and 56..63 (values).
        """
        match name.split("."):
            case ["layers", _, "attention", "query_key_value", _]:
                config = self.config
                counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
                parts = torch.split(values, [count * config.head_size for count in counts])
                return torch.cat([self._rows(part) for part in parts])
            case ["layers", _, "mlp", *_, "gate_up", _]:
                return torch.cat([self._rows(part) for part in values.chunk(2)])
            case ["layers", _, "mlp", "up", _]:
                return self._rows(values).clone()
            case ["layers", _, "attention", "query_norm" | "key_norm", _] if self.config.query_key_norm == "heads":
                return self._rows(values).clone()
            case ["layers", _, "attention", "output", "weight"] | ["layers", _, "mlp", *_, "down", "weight"]:
                return values.chunk(self.size, dim=1)[self.rank].contiguous()
        return values

    def _rows(self, values: Tensor) -> Tensor:
        return values.chunk(self.size)[self.rank]

    def apply(self, network: Decoder) -> None:
        """Makes a network whose parameters are this rank's parts compute with them."""
        network.config = self.divided
        for layer in network.layers:
            assert isinstance(layer, DecoderLayer)
            attention = layer.attention
            attention.num_heads //= self.size
            attention.num_kv_heads //= self.size
            attention.num_fused_heads //= self.size
            slopes = attention.rules.alibi_slopes
            if slopes is not None:
                attention.rules = replace(attention.rules, alibi_slopes=self._rows(slopes))
            attention.add_module("output", SummedLinear(attention.output))
            if isinstance(layer.mlp, SparseMLP):
                assert network.config.experts is not None
                layer.mlp.config = network.config.experts
                layer.add_module("mlp", SummedMLP(layer.mlp))
            else:
                layer.mlp.add_module("down", SummedLinear(layer.mlp.down))
