"""From token states to one vector per text: the modules of a sentence-transformers folder, over packed texts.

Everything past pooling is computed in float32. Knows no files but its own modules' weights (the layout is
`model.embedding_config`), no tokens and no prompts. Runs in the worker process.

Legend: T tokens packed in the step, B texts, E hidden size.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.architectures.mapping import WeightMap, part
from model.checkpoint import fill
from model.embedding_config import ActivationName, Dense, EmbeddingConfig, Norm, Normalize, Pooling
from model.layers import Device, LayerNorm, Linear
from model.pooling import Span, pool

ACTIVATIONS: Mapping[ActivationName, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class SentenceModules(nn.Module):
    """Pooling and what follows it, in the folder's order; the weights are float32."""

    def __init__(self, config: EmbeddingConfig, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.weights = nn.ModuleDict()
        for index, step in enumerate(config.steps):
            if isinstance(step, Dense):
                self.weights[str(index)] = DenseModule(step, device)
            elif isinstance(step, Norm):
                self.weights[str(index)] = _load_norm(step, device)

    def forward(self, hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """hidden [T, E]; returns float32 [B, size of the last module]."""
        vectors = hidden
        for index, step in enumerate(self.config.steps):
            if isinstance(step, Pooling):
                vectors = pool(hidden, spans, step)
            elif isinstance(step, Normalize):
                vectors = _unit(vectors)
            else:
                vectors = self.weights[str(index)](vectors)
        size = self.config.truncated_size
        if size is None:
            return vectors
        # Unlike sentence-transformers', which cuts unit vectors and leaves them short of it.
        return _unit(vectors[:, :size]) if self.config.normalized else vectors[:, :size]


def _unit(vectors: Tensor) -> Tensor:
    """`F.normalize`, in half the calls."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(1e-12)


class DenseModule(nn.Module):
    """activation(linear(x)), plus x (projected where the sizes differ) if residual."""

    def __init__(self, config: Dense, device: Device) -> None:
        super().__init__()
        self.linear = Linear(config.in_size, config.out_size, bias=config.bias)
        projected = config.residual and config.in_size != config.out_size
        self.residual = Linear(config.in_size, config.out_size) if projected else None
        self.is_residual = config.residual
        self.activation = ACTIVATIONS[config.activation]
        names = [name for name, _ in self.named_parameters()]
        fill(self, config.folder, _same_names(names), device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.linear(x))
        if not self.is_residual:
            return out
        return out + (x if self.residual is None else self.residual(x))


def _load_norm(config: Norm, device: Device) -> nn.Module:
    holder = nn.Module()
    holder.norm = LayerNorm(config.size, 1e-5)
    fill(holder, config.folder, _same_names(["norm.weight", "norm.bias"]), device=device, dtype=torch.float32)
    return holder.norm


def _same_names(names: Sequence[str]) -> WeightMap:
    return WeightMap(parameters={name: part(name) for name in names})
