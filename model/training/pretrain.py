"""The language model's training loop, used by both of its stages (prose, then instructions).

Takes batches as a function of the step, so it knows nothing of texts. bfloat16 autocast with float32 weights; a batch
is split into micro-batches to bound the memory of the logits. Runs in the training process, on CPU or GPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.training.data import IGNORED
from model.training.networks import Llama
from model.training.optimizers import MuonAndAdamW
from model.training.run import Run, learning_rate_factor

Batches = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelSettings:
    """How one stage is trained."""

    steps: int
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    weight_decay: float = 0.01
    warmup: int = 50
    decay: int = 400
    micro_batch: int = 4
    validate_every: int = 100
    save_every: int = 50
    max_minutes: float | None = None


def mean_loss(network: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per target that counts."""
    hidden = network(inputs)
    logits = network.logits(hidden).float()  # [B, L, V]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.inference_mode()
def validation_loss(network: Llama, batches: list[tuple[Tensor, Tensor]]) -> float:
    device = next(network.parameters()).device
    network.eval()
    with torch.autocast(device.type, torch.bfloat16):
        losses = [mean_loss(network, inputs.to(device), targets.to(device)).item() for inputs, targets in batches]
    network.train()
    return sum(losses) / len(losses)


def _backward(network: Llama, inputs: Tensor, targets: Tensor, micro_batch: int) -> float:
    """Add the gradients of one batch; returns its loss."""
    device = next(network.parameters()).device
    counted = max(1, int((targets != IGNORED).sum()))
    total = 0.0
    for start in range(0, len(inputs), micro_batch):
        part, wanted = inputs[start : start + micro_batch].to(device), targets[start : start + micro_batch].to(device)
        share = int((wanted != IGNORED).sum()) / counted
        with torch.autocast(device.type, torch.bfloat16):
            loss = mean_loss(network, part, wanted) * share
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def train_language_model(
    network: Llama,
    batches: Batches,
    validation: list[tuple[Tensor, Tensor]],
    *,
    settings: LanguageModelSettings,
    run: Run,
) -> None:
    """Train in place until `settings.steps` or `max_minutes`; resumes from the run's state and leaves one behind."""
    optimizer = MuonAndAdamW(
        network, muon_rate=settings.muon_rate, adam_rate=settings.adam_rate, weight_decay=settings.weight_decay
    )
    step = 0
    if (state := run.load()) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    started = time.monotonic()
    network.train()
    bar = tqdm(total=settings.steps, initial=step, desc=run.folder.name, unit="step", mininterval=5)
    while step < settings.steps:
        loss = _backward(network, *batches(step), settings.micro_batch)
        factor = learning_rate_factor(step, steps=settings.steps, warmup=settings.warmup, decay=settings.decay)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step(factor)
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
        out_of_time = settings.max_minutes is not None and time.monotonic() - started > 60 * settings.max_minutes
        if step % 10 == 0:
            run.record(step, loss=loss)
        if step % settings.validate_every == 0 or step == settings.steps:
            run.record(step, validation_loss=validation_loss(network, validation))
        if step % settings.save_every == 0 or step == settings.steps or out_of_time:
            run.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        if out_of_time:
            break
    bar.close()
