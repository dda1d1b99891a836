"""What adapters add to a step: each its own products of low rank, beside the projections that all rows share.

    y += (x A^T) B^T        A [r, K], B [N, r] with the scale in it (arXiv 2106.09685)

The rows of a step say which adapter they are computed with; those that say none cost nothing. Knows layers and their
projections by name, not where the numbers come from (`model.adapters.pairs`). Runs in the worker process.

Legend: T tokens of the step, M of them with one adapter, r rank, K inputs, N outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.ops import library


class LowRank:
    """The two products with torch, on any device. The first one's result has the dtype of x, sums are float32."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self._a, self._b = a, b

    @property
    def num_bytes(self) -> int:
        return self._a.nbytes + self._b.nbytes

    def add(self, x: Tensor, out: Tensor) -> None:
        """x [M, K]; out [M, N] is added to, in its place."""
        out.addmm_(x @ self._a.T, self._b.T)


class PackedLowRank:
    """The same on the compiled operators, by which a row's result does not depend, to a bit, on those beside it."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a: Tensor = torch.ops.slimpajama.pack_bf16(a)
        self.b: Tensor = torch.ops.slimpajama.pack_bf16(b)

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def add(self, x: Tensor, out: Tensor) -> None:
        torch.ops.slimpajama.add_low_rank(x, self.a, self.b, out)


Product = LowRank | PackedLowRank


class AdapterWeights:
    """One adapter's products, by layer and the name of the projection beside which they are."""

    def __init__(self, pairs: Iterable[tuple[int, str, Tensor, Tensor]], dtype: torch.dtype, device: torch.device):
        """`pairs`: layer, projection, A and B of each; they are taken in this dtype, on this device."""
        self.layers: dict[int, dict[str, Product]] = {}
        for layer, projection, a, b in pairs:
            a, b = a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous()
            product = PackedLowRank(a, b) if library.serves(a) else LowRank(a, b)
            self.layers.setdefault(layer, {})[projection] = product
        self.joined: Any = None
        """All of them as one, for the operator that computes all layers (`model.compiled_decoder`)."""

    @property
    def num_bytes(self) -> int:
        return sum(product.num_bytes for layer in self.layers.values() for product in layer.values())


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens from `begin` to `end` of a step, which all have one adapter."""

    begin: int
    end: int
    weights: AdapterWeights


class StepAdapters:
    """The runs of a step."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs

    def of_layer(self, index: int) -> "LayerAdapters":
        nothing: Mapping[str, Product] = {}
        return LayerAdapters([(run, run.weights.layers.get(index, nothing)) for run in self.runs])


class LayerAdapters:
    """Implements `Additions` for one layer."""

    def __init__(self, parts: Sequence[tuple[Run, Mapping[str, Product]]]) -> None:
        self._parts = parts

    def add(self, projection: str, x: Tensor, out: Tensor) -> Tensor:
        for run, products in self._parts:
            product = products.get(projection)
            if product is not None:
                product.add(x[run.begin : run.end], out[run.begin : run.end])
        return out


def runs_of(adapters: Sequence[AdapterWeights | None], starts: Sequence[int]) -> list[Run]:
    """The runs of rows with these adapters, of which row i has the tokens starts[i] .. starts[i + 1] - 1; neighbours
    with the same one are one run.

    Worked example: adapters [None, a, a, b] and starts [0, 3, 4, 6, 7] give a from 3 to 6 and b from 6 to 7.
    """
    runs: list[Run] = []
    for weights, begin, end in zip(adapters, starts, starts[1:], strict=False):
        if weights is None:
            continue
        if runs and runs[-1].weights is weights and runs[-1].end == begin:
            begin = runs.pop().begin
        runs.append(Run(begin, end, weights))
    return runs
