"""Fine-tuning: the encoder's heads, all on one body while distillation goes on.

Every step trains one source of batches, chosen by (seed, step): the teacher's embeddings, sentiment, intents, spam or
spans. The body thus serves all heads in one pass, and its embeddings stay where the teacher's are.
Runs in the training process, on CPU or GPU.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from model.training.distill import Distillation, Lessons
from model.training.heads import Head, HeadConfig
from model.training.loop import StageSettings, train
from model.training.networks import Bert
from model.training.optimizers import Scheduled
from model.training.run import Run
from model.training.sources import LabelledText, Question
from model.training.tables import EndlessBatches, TokenTable

BACKBONE = "distillation"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: its ids, how many of them belong to the first text, and the class or the (start, end) token."""

    ids: list[int]
    first_length: int
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A head to train and its examples."""

    name: str
    config: HeadConfig
    examples: Sequence[Encoded]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings(StageSettings):
    """How the body and the heads are trained: each source's share of the steps, and its padded tokens per step."""

    mix: dict[str, float]
    batch_tokens: dict[str, int]
    learning_rate: float = 2e-4
    head_learning_rate: float = 1e-3
    similarity_weight: float = 5.0
    dropout: float = 0.1
    seed: int = 2


def encode_labelled(tokenizer: Tokenizer, rows: Sequence[LabelledText], config: HeadConfig) -> list[Encoded]:
    index = {label: number for number, label in enumerate(config.labels)}
    encodings = tokenizer.encode_batch([row.text for row in rows])
    return [
        Encoded(encoding.ids, len(encoding.ids), (index[row.label],))
        for encoding, row in zip(encodings, rows, strict=True)
    ]


def encode_questions(tokenizer: Tokenizer, rows: Sequence[Question]) -> list[Encoded]:
    """Pairs with the answer's first and last token; rows whose answer is cut off by the length limit are left out."""
    encodings = tokenizer.encode_batch([(row.question, row.context) for row in rows])
    found = []
    for encoding, row in zip(encodings, rows, strict=True):
        start, text = row.answers[0]
        first = encoding.char_to_token(start, 1)
        last = encoding.char_to_token(start + len(text.rstrip()) - 1, 1)
        if first is not None and last is not None:
            found.append(Encoded(encoding.ids, encoding.type_ids.index(1), (first, last)))
    return found


class ExampleTable:
    """The examples of one task as tensors on the device."""

    def __init__(self, examples: Sequence[Encoded], device: torch.device | str) -> None:
        self.ids = TokenTable([example.ids for example in examples], device)
        self._first_lengths = torch.tensor([example.first_length for example in examples], device=device)
        self._targets = torch.tensor([example.target for example in examples], device=device)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, mask, type ids), each [B, L], and the targets, [B, 1] or [B, 2]."""
        ids, mask = self.ids.batch(rows)
        index = torch.tensor(rows, device=ids.device)
        second = torch.arange(ids.shape[1], device=ids.device) >= self._first_lengths[index, None]
        return ids, mask, (second & mask).long(), self._targets[index]


def task_loss(network: Bert, head: Head, ids: Tensor, mask: Tensor, types: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over labels, or over the context's tokens for start and end."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = network(ids, mask, types)
    logits: Tensor = head(hidden, mask)
    if head.config.kind == "classification":
        return F.cross_entropy(logits, targets[:, 0])
    logits = logits.masked_fill((types == 0).unsqueeze(-1), -torch.inf)  # [B, L, 2]
    return (F.cross_entropy(logits[..., 0], targets[:, 0]) + F.cross_entropy(logits[..., 1], targets[:, 1])) / 2


class Schedule:
    """Which source a step trains, and the how-manieth batch of that source it is; a function of (seed, step)."""

    def __init__(self, mix: dict[str, float], seed: int) -> None:
        self._names, self._shares = list(mix), list(mix.values())
        self._rng = random.Random(seed)
        self._drawn: list[tuple[str, int]] = []
        self._counts = dict.fromkeys(mix, 0)

    def at(self, step: int) -> tuple[str, int]:
        while step >= len(self._drawn):
            name = self._rng.choices(self._names, self._shares)[0]
            self._drawn.append((name, self._counts[name]))
            self._counts[name] += 1
        return self._drawn[step]


def _set_dropout(network: Bert, rate: float) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate


class TaskLessons:
    """One task's batches, made of its examples when the first step needs them."""

    def __init__(self, network: Bert, head: Head, task: Task, settings: FinetuneSettings, seed: int) -> None:
        self._network, self._head, self._dropout = network, head, settings.dropout
        self._table = ExampleTable(task.examples, head.weight.device)
        batch_tokens = settings.batch_tokens[task.name]
        self._order = EndlessBatches(self._table.ids.lengths, batch_tokens=batch_tokens, seed=seed)

    def learn(self, turn: int) -> Tensor:
        """Adds the gradients of one batch; returns its loss."""
        _set_dropout(self._network, self._dropout)
        loss = task_loss(self._network, self._head, *self._table.batch(self._order.rows(turn)))
        loss.backward()  # type: ignore[no-untyped-call]
        _set_dropout(self._network, 0.0)  # a regression to the teacher's vectors wants no noise
        return loss


def finetune(
    network: Bert,
    tasks: Sequence[Task],
    lessons: Callable[[], Lessons] | None,
    *,
    settings: FinetuneSettings,
    run: Run,
) -> dict[str, Head]:
    """Train body and heads in place; `lessons` serve the share named "distillation"."""
    device = next(network.parameters()).device
    torch.manual_seed(settings.seed)
    heads = {task.name: Head(task.config, network.shape.hidden_size).to(device) for task in tasks}
    whole = nn.ModuleDict({"body": network, "heads": nn.ModuleDict(heads)})
    groups = [
        {"params": list(network.parameters()), "lr": settings.learning_rate},
        {"params": list(whole["heads"].parameters()), "lr": settings.head_learning_rate},
    ]
    optimizer = Scheduled(torch.optim.AdamW(groups, weight_decay=0.01, fused=device.type == "cuda"))
    sources: dict[str, TaskLessons | Distillation] = {
        task.name: TaskLessons(network, heads[task.name], task, settings, settings.seed + number)
        for number, task in enumerate(tasks)
    }
    validate = None
    if lessons is not None:
        sources[BACKBONE] = teaching = Distillation(
            network,
            lessons,
            batch_tokens=settings.batch_tokens[BACKBONE],
            similarity_weight=settings.similarity_weight,
            seed=settings.seed,
        )
        validate = lambda: {"validation_cosine": teaching.mean_cosine()}  # noqa: E731
    schedule = Schedule(settings.mix, settings.seed)

    def learn(step: int) -> dict[str, Tensor]:
        name, turn = schedule.at(step)
        return {f"{name}_loss": sources[name].learn(turn)}

    train(whole, optimizer, learn, settings=settings, run=run, validate=validate, body=network)
    return {name: head.eval() for name, head in heads.items()}
