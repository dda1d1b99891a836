"""The checkpoint's own head over the last hidden states: sequence and token classification, question answering.

What a score means (softmax, sigmoid, none) is for the API process to say; here are raw logits. Runs in the worker
process.

Legend: E hidden size, L outputs (labels; 2 for spans).
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
