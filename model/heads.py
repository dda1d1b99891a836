"""The checkpoint's own head over the last hidden states: sequence and token classification, question answering.

What a score means (softmax, sigmoid, none) is for the API process to say; here are raw logits. Runs in the worker
process.

Legend: T tokens packed in the step, B texts, E hidden size, L outputs (labels; 2 for spans).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import HeadConfig
from model.layers import LayerNorm, Linear, gelu_tanh

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Head(nn.Module):
    """[dense, activation, [norm]] and one linear layer, applied to a state per text or per token."""

    def __init__(self, config: HeadConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.dense = Linear(size, size, bias=config.dense_bias) if config.dense else None
        self.activation = ACTIVATIONS[config.activation]
        self.norm = LayerNorm(size, config.norm_epsilon, bias=config.norm_bias) if config.norm else None
        self.output = Linear(size, config.num_outputs, bias=config.bias)

    def forward(self, states: Tensor) -> Tensor:
        """states [..., E]; returns float32 [..., L]."""
        if self.dense is not None:
            states = self.activation(self.dense(states))
        if self.norm is not None:
            states = self.norm(states)
        logits: Tensor = self.output(states)
        return logits.float()

    def states(self, hidden: Tensor, starts: Tensor) -> Tensor:
        """The state per text that a "sequence" head reads: hidden [T, E], starts [B + 1]; returns [B, E]."""
        if self.config.pooling == "first":
            return hidden[starts[:-1]]
        if self.config.pooling == "last":
            return hidden[starts[1:] - 1]
        return segment_sums(hidden, starts).to(hidden.dtype) / (starts[1:] - starts[:-1])[:, None]


def segment_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sums over each text, in float32: values [T, E], starts [B + 1]; returns [B, E]."""
    lengths = starts[1:] - starts[:-1]
    return torch.segment_reduce(values.float(), "sum", lengths=lengths.to(torch.int64), axis=0)
