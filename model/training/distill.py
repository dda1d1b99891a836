"""Distillation: a student of fewer layers or word pieces learns to place sentences where the teacher places them.

Its loss is the cosine distance to the teacher's embedding plus the error in the similarities between the sentences of
a batch (relational distillation, arXiv:1904.05068). Runs in the training process, on CPU or GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.loop import StageSettings, train
from model.training.networks import Bert
from model.training.optimizers import Scheduled
from model.training.run import Run
from model.training.tables import EndlessBatches, TokenTable
from model.training.teacher import mean_pool

NUM_VALIDATION = 512
MAX_SIMILARITY_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings(StageSettings):
    """How the student is trained."""

    batch_tokens: int = 2048
    learning_rate: float = 5e-4
    similarity_weight: float = 5.0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Lessons:
    """Texts as the student's ids, and where the teacher places each: [len(ids), E], float16, on the same device."""

    ids: TokenTable
    targets: Tensor


def distillation_loss(student: Tensor, teacher: Tensor, similarity_weight: float) -> Tensor:
    """Both [B, E] and normalized; mean cosine distance plus the weighted mean squared error of similarities."""
    distance = 1 - (student * teacher).sum(-1).mean()
    ours, theirs = student[:MAX_SIMILARITY_ROWS], teacher[:MAX_SIMILARITY_ROWS]
    similarity = F.mse_loss(ours @ ours.T, theirs @ theirs.T)
    return distance + similarity_weight * similarity


def student_embeddings(network: Bert, ids: Tensor, mask: Tensor) -> Tensor:
    """Normalized embeddings [B, E] of one batch, with gradients."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = network(ids, mask)
    return F.normalize(mean_pool(hidden.float(), mask), dim=-1)


class Distillation:
    """The share of training that follows the teacher. `lessons` is asked for when the first step needs it."""

    def __init__(
        self, network: Bert, lessons: Callable[[], Lessons], *, batch_tokens: int, similarity_weight: float, seed: int
    ) -> None:
        self._network, self._ask = network, lessons
        self._batch_tokens, self._similarity_weight, self._seed = batch_tokens, similarity_weight, seed

    @cached_property
    def _lessons(self) -> Lessons:
        return self._ask()

    @cached_property
    def _order(self) -> EndlessBatches:
        lengths = self._lessons.ids.lengths[NUM_VALIDATION:]
        return EndlessBatches(lengths, batch_tokens=self._batch_tokens, seed=self._seed)

    def _pair(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(the student's, the teacher's) embeddings of the rows."""
        ids, mask = self._lessons.ids.batch(rows)
        wanted = self._lessons.targets[torch.tensor(rows, device=ids.device)].float()
        return student_embeddings(self._network, ids, mask), F.normalize(wanted, dim=-1)

    def learn(self, turn: int) -> Tensor:
        """Adds the gradients of one batch; returns its loss."""
        found, wanted = self._pair([NUM_VALIDATION + row for row in self._order.rows(turn)])
        loss = distillation_loss(found, wanted, self._similarity_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def mean_cosine(self) -> float:
        """The mean cosine between the student and the teacher on the first texts, which no step learns from."""
        self._network.eval()
        total, count = 0.0, min(NUM_VALIDATION, len(self._lessons.ids))
        for start in range(0, count, 32):
            found, wanted = self._pair(range(start, min(start + 32, count)))
            total += float((found * wanted).sum())
        return total / count


def distill(network: Bert, lessons: Callable[[], Lessons], *, settings: DistillSettings, run: Run) -> None:
    """Train in place."""
    teaching = Distillation(
        network,
        lessons,
        batch_tokens=settings.batch_tokens,
        similarity_weight=settings.similarity_weight,
        seed=settings.seed,
    )
    device = next(network.parameters()).device
    optimizer = Scheduled(
        torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=0.01, fused=device.type == "cuda"
        )
    )
    train(
        network,
        optimizer,
        lambda step: {"loss": teaching.learn(step)},
        settings=settings,
        run=run,
        validate=lambda: {"validation_cosine": teaching.mean_cosine()},
    )
