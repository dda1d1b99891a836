"""The weights of a checkpoint's task heads, and their logits from the states of one packed forward.

A head is a linear map in float32, whatever the body's type. What the logits mean is for the API process to say. Runs in
the worker process.

Legend: T tokens packed in the step, B texts, E hidden size, L outputs of the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.architectures.mapping import WeightMap, part
from model.checkpoint import fill
from model.layers import Device, Linear
from model.pooling import POOLERS, Span
from model.sentence_transformer import SentenceModules
from model.task_heads import TaskHeadConfig


class TaskHead(nn.Module):
    """`size` is that of the states it reads: the network's hidden size, or the embedding's."""

    def __init__(self, config: TaskHeadConfig, size: int, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.linear = Linear(size, config.num_outputs, bias=True)
        weights = WeightMap(parameters={"linear.weight": part("weight"), "linear.bias": part("bias")})
        fill(self, config.folder, weights, device=device, dtype=torch.float32)

    def per_text(self, hidden: Tensor, spans: Sequence[Span], embedder: SentenceModules) -> Tensor:
        """hidden [T, E]; returns float32 [B, L]."""
        states = embedder(hidden, spans) if self.config.input == "embedding" else POOLERS["cls"](hidden, spans)
        logits: Tensor = self.linear(states.float())
        return logits

    def per_token(self, hidden: Tensor) -> Tensor:
        """hidden [T, E]; returns float32 [T, L]."""
        logits: Tensor = self.linear(hidden.float())
        return logits
