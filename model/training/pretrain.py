"""The language model's stages (prose, instructions, manners): one loss, one pair of optimizers.

Takes batches as a function of the step, so it knows nothing of texts. bfloat16 autocast with float32 weights; a batch
is split into micro-batches to bound the memory of the logits. Runs in the training process, on CPU or GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.data import Batch
from model.training.loop import StageSettings, train
from model.training.networks import Llama
from model.training.optimizers import muon_and_adamw
from model.training.run import Run

Batches = Callable[[int], Batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelSettings(StageSettings):
    """How one stage is trained."""

    muon_rate: float = 0.02
    adam_rate: float = 0.004
    weight_decay: float = 0.01
    micro_batch: int = 4


def total_loss(network: Llama, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the cross-entropies of all targets, in nats."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = network.logits(network(inputs))  # [B, L, V]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def learn_batch(network: Llama, batch: Batch, micro_batch: int) -> Tensor:
    """Adds the gradients of the mean loss of one batch; returns that loss."""
    total_weight = batch[2].sum().clamp(min=1e-6)
    losses = []
    for inputs, targets, weights in zip(*(torch.split(part, micro_batch) for part in batch), strict=True):
        loss = total_loss(network, inputs, targets, weights) / total_weight
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@torch.no_grad()
def validation_loss(network: Llama, batches: Sequence[Batch]) -> float:
    """The mean loss in nats per target."""
    network.eval()
    losses = [total_loss(network, *batch) / batch[2].sum() for batch in batches]
    return float(torch.stack(losses).mean())


def train_language_model(
    network: Llama, batches: Batches, validation: Sequence[Batch], *, settings: LanguageModelSettings, run: Run
) -> None:
    """Train one stage in place."""
    train(
        network,
        muon_and_adamw(
            network, muon_rate=settings.muon_rate, adam_rate=settings.adam_rate, weight_decay=settings.weight_decay
        ),
        lambda step: {"loss": learn_batch(network, batches(step), settings.micro_batch)},
        settings=settings,
        run=run,
        validate=lambda: {"validation_loss": validation_loss(network, validation)},
    )
