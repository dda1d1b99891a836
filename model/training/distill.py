"""Distillation: a student of fewer layers and word pieces learns to place sentences where the teacher places them.

The student starts where `compress` left it. Its loss is the cosine distance to the teacher's embedding plus the
error in the similarities between the sentences of a batch
(relational distillation, arXiv:1904.05068). Runs in the training process, on CPU or GPU.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.training.networks import Bert
from model.training.run import Run, learning_rate_factor
from model.training.teacher import mean_pool, pad


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """How the student is trained."""

    steps: int
    batch_tokens: int = 2048
    learning_rate: float = 5e-4
    warmup: int = 50
    decay: int = 500
    similarity_weight: float = 5.0
    seed: int = 1
    validate_every: int = 100
    save_every: int = 50
    max_minutes: float | None = None


def batches_by_length(lengths: Sequence[int], *, batch_tokens: int, seed: int) -> list[list[int]]:
    """All rows once, in batches of at most `batch_tokens` padded tokens, rows of like length together, order seeded."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), 2048):
        rows: list[int] = []
        for row in sorted(order[start : start + 2048].tolist(), key=lambda index: lengths[index]):
            if rows and (len(rows) + 1) * lengths[row] > batch_tokens:
                batches.append(rows)
                rows = []
            rows.append(row)
        batches.append(rows)
    return [batches[index] for index in rng.permutation(len(batches)).tolist()]


class EndlessBatches:
    """Epoch after epoch of `batches_by_length`; `rows(step)` depends on the step alone."""

    def __init__(self, lengths: Sequence[int], *, batch_tokens: int, seed: int) -> None:
        self._lengths, self._batch_tokens, self._seed = lengths, batch_tokens, seed
        self._epochs: list[list[list[int]]] = []

    def rows(self, step: int) -> list[int]:
        while step >= sum(len(epoch) for epoch in self._epochs):
            seed = self._seed + len(self._epochs)
            self._epochs.append(batches_by_length(self._lengths, batch_tokens=self._batch_tokens, seed=seed))
        for epoch in self._epochs:
            if step < len(epoch):
                return epoch[step]
            step -= len(epoch)
        raise AssertionError("an epoch holds the step")


def distillation_loss(student: Tensor, teacher: Tensor, similarity_weight: float) -> Tensor:
    """Both [B, E] and normalized; mean cosine distance plus the weighted mean squared error of similarities."""
    distance = 1 - (student * teacher).sum(-1).mean()
    similarity = F.mse_loss(student @ student.T, teacher @ teacher.T)
    return distance + similarity_weight * similarity


def student_embeddings(network: Bert, ids: Sequence[Sequence[int]]) -> Tensor:
    """Normalized embeddings of one batch, with gradients."""
    device = next(network.parameters()).device
    batch, mask = (tensor.to(device) for tensor in pad(ids))
    with torch.autocast(device.type, torch.bfloat16):
        hidden = network(batch, mask)
    return F.normalize(mean_pool(hidden.float(), mask), dim=-1)


def distill(
    network: Bert,
    ids: Sequence[Sequence[int]],
    targets: NDArray[np.float16],
    *,
    settings: DistillSettings,
    run: Run,
    num_validation: int = 512,
) -> None:
    """Train in place; the first `num_validation` texts only judge. Resumes from the run's state."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    order = EndlessBatches(
        [len(row) for row in ids[num_validation:]], batch_tokens=settings.batch_tokens, seed=settings.seed
    )
    step = 0
    if (state := run.load()) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    started = time.monotonic()
    bar = tqdm(total=settings.steps, initial=step, desc=run.folder.name, unit="step", mininterval=5)
    while step < settings.steps:
        network.train()
        rows = [num_validation + row for row in order.rows(step)]
        wanted = F.normalize(torch.from_numpy(targets[rows].astype(np.float32)), dim=-1)
        found = student_embeddings(network, [ids[row] for row in rows])
        loss = distillation_loss(found, wanted.to(found.device), settings.similarity_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        factor = learning_rate_factor(step, steps=settings.steps, warmup=settings.warmup, decay=settings.decay)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        out_of_time = settings.max_minutes is not None and time.monotonic() - started > 60 * settings.max_minutes
        if step % 10 == 0:
            run.record(step, loss=loss.item())
        if step % settings.validate_every == 0 or step == settings.steps:
            cosine = mean_cosine(network, ids[:num_validation], targets[:num_validation])
            run.record(step, validation_cosine=cosine)
            bar.set_postfix(cosine=f"{cosine:.4f}")
        if step % settings.save_every == 0 or step == settings.steps or out_of_time:
            run.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        if out_of_time:
            break
    bar.close()


@torch.inference_mode()
def mean_cosine(network: Bert, ids: Sequence[Sequence[int]], targets: NDArray[np.float16]) -> float:
    """The mean cosine between the student's and the teacher's embeddings."""
    network.eval()
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    total = 0.0
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        wanted = F.normalize(torch.from_numpy(targets[rows].astype(np.float32)), dim=-1)
        found = student_embeddings(network, [ids[row] for row in rows]).cpu()
        total += float((found * wanted).sum())
    return total / len(order)
