"""The sparse MLP: a router chooses, token by token, which few of many gated MLPs compute it, and with what share.

    y = sum over the chosen e of share(e) * expert_e(x)        (arXiv 1701.06538, 2101.03961)

Experts are ordinary MLPs, so that whatever packs, quantizes or divides projections does it to theirs, too. What devices
have that is better than one expert after another is in `model.compiled_layers` and `model.gpu_experts`. Knows no
architecture. Runs in the worker process.

Legend: T tokens, E hidden size, X experts, C experts chosen for each token.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DecoderActivation, ExpertsConfig
from model.layers import ACTIVATIONS, Additions, GatedMLP, parameter

LEAST_SUM = 1e-20
"""Of shares that are divided by it."""


class Mixture(nn.Module, ABC):
    """A router, and what is made of its choice: shares and sums are float32."""

    config: ExpertsConfig
    router: nn.Module
    selection_bias: Tensor | None
    shared: nn.Module | None
    shared_gate: nn.Module | None

    def forward(self, x: Tensor, _: Additions | None = None) -> Tensor:
        """x [T, E]. Nothing is added to experts: adapters of theirs are refused (`model.adapters.places`)."""
        shares, chosen = choose(self.router(x), self.selection_bias, self.config)
        # The first expert's tokens, then the next one's; a token several times, once for each of its experts.
        experts, order = chosen.flatten().sort(stable=True)  # [T * C]
        made = self.made(x[order // self.config.num_chosen], experts)
        by_token = torch.empty_like(made).index_copy_(0, order, made).view(*chosen.shape, -1)  # [T, C, E]
        out = (by_token.float() * shares[:, :, None]).sum(1)
        if self.shared is not None:
            shared = self.shared(x).float()
            out += shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared
        return out.to(x.dtype)

    @abstractmethod
    def made(self, x: Tensor, experts: Tensor) -> Tensor:
        """What experts make of rows [.., E], each row by the one whose number is beside it; numbers rise."""


class Router(nn.Module):
    """Scores x W^T in float32. No `Linear`: what chooses experts is neither rounded nor quantized, for errors of it
    choose others."""

    def __init__(self, hidden_size: int, num_scores: int) -> None:
        super().__init__()
        self.weight = parameter(num_scores, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class SparseMLP(Mixture):
    """In the place of a layer's MLP."""

    router: Router
    shared_gate: Router | None

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, activation: DecoderActivation) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS.get(activation)
        self.router = Router(hidden_size, config.num_experts)
        self.selection_bias = parameter(config.num_experts) if config.selection_bias else None  # float32

        def mlp(size: int) -> GatedMLP:
            return GatedMLP(hidden_size, size, activation=activation, bias=False)

        self.experts = nn.ModuleList(mlp(config.intermediate_size) for _ in range(config.num_experts))
        self.shared = None if config.shared_size is None else mlp(config.shared_size)
        self.shared_gate = Router(hidden_size, 1) if config.shared_gate else None

    def made(self, x: Tensor, experts: Tensor) -> Tensor:
        counts = experts.bincount(minlength=len(self.experts)).tolist()
        parts = zip(self.experts, torch.split(x, counts), strict=True)
        return torch.cat([expert(rows) for expert, rows in parts if len(rows)])


def choose(scores: Tensor, bias: Tensor | None, config: ExpertsConfig) -> tuple[Tensor, Tensor]:
    """The shares [T, C] and which experts they are of, by the router's scores [T, X], all float32."""
    shares = torch.softmax(scores, dim=-1) if config.scores == "softmax" else torch.sigmoid(scores)
    chosen = (shares if bias is None else shares + bias).topk(config.num_chosen).indices
    shares = shares.gather(1, chosen)
    if config.normalized:
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=LEAST_SUM)
    return shares * config.scale, chosen
