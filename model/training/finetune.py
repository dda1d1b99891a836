"""Fine-tuning: the encoder's heads, all on one body while distillation goes on; and the LM's instruction stage.

Every step trains one source of batches, chosen by (seed, step): the teacher's embeddings, sentiment, intents, spam or
spans. The body thus serves all heads in one pass, and its embeddings stay where the teacher's are.
Runs in the training process, on CPU or GPU.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.training.distill import EndlessBatches, distillation_loss, student_embeddings
from model.training.heads import Head, HeadConfig
from model.training.networks import Bert
from model.training.run import Run, learning_rate_factor
from model.training.sources import LabelledText, Question

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
class FinetuneSettings:
    """How the body and the heads are trained; `mix` gives each source's share of the steps."""

    steps: int
    mix: dict[str, float]
    batch_tokens: int = 2048
    learning_rate: float = 2e-4
    head_learning_rate: float = 1e-3
    warmup: int = 50
    decay: int = 800
    similarity_weight: float = 5.0
    dropout: float = 0.1
    seed: int = 2
    save_every: int = 100
    max_minutes: float | None = None


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
        span = range(start, start + len(text))
        tokens = [
            number
            for number, (kind, (first, last)) in enumerate(zip(encoding.type_ids, encoding.offsets, strict=True))
            if kind == 1 and last > first and first < span.stop and last > span.start
        ]
        if tokens:
            found.append(Encoded(encoding.ids, encoding.type_ids.index(1), (tokens[0], tokens[-1])))
    return found


def pad_examples(examples: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, type ids), each [B, L]."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    types = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = True
        types[row, example.first_length : len(example.ids)] = 1
    return ids, mask, types


def task_loss(network: Bert, head: Head, examples: Sequence[Encoded]) -> Tensor:
    """Cross-entropy over labels, or over the context's tokens for start and end."""
    device = next(network.parameters()).device
    ids, mask, types = (tensor.to(device) for tensor in pad_examples(examples))
    targets = torch.tensor([example.target for example in examples], device=device)  # [B, 1] or [B, 2]
    with torch.autocast(device.type, torch.bfloat16):
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


def finetune(
    network: Bert,
    tasks: Sequence[Task],
    texts: tuple[Sequence[Sequence[int]], NDArray[np.float16]] | None,
    *,
    settings: FinetuneSettings,
    run: Run,
) -> dict[str, Head]:
    """Train body and heads in place; `texts` are (ids, the teacher's embeddings) for the share named "distillation"."""
    device = next(network.parameters()).device
    torch.manual_seed(settings.seed)
    heads = {task.name: Head(task.config, network.shape.hidden_size).to(device) for task in tasks}
    parameters = torch.nn.ModuleDict({"body": network, "heads": torch.nn.ModuleDict(heads)})
    optimizer = torch.optim.AdamW(
        [
            {"params": list(network.parameters()), "peak": settings.learning_rate},
            {"params": [p for head in heads.values() for p in head.parameters()], "peak": settings.head_learning_rate},
        ],
        weight_decay=0.01,
    )
    step = 0
    if (state := run.load()) is not None:
        parameters.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    sources: dict[str, EndlessBatches] = {}
    for number, task in enumerate(tasks):
        lengths = [len(example.ids) for example in task.examples]
        sources[task.name] = EndlessBatches(lengths, batch_tokens=settings.batch_tokens, seed=settings.seed + number)
    if texts is not None:
        lengths = [len(row) for row in texts[0]]
        sources[BACKBONE] = EndlessBatches(lengths, batch_tokens=settings.batch_tokens, seed=settings.seed)
    examples = {task.name: task.examples for task in tasks}
    schedule = Schedule(settings.mix, settings.seed)
    started = time.monotonic()
    bar = tqdm(total=settings.steps, initial=step, desc=run.folder.name, unit="step", mininterval=5)
    while step < settings.steps:
        network.train()
        name, turn = schedule.at(step)
        rows = sources[name].rows(turn)
        if name == BACKBONE:
            assert texts is not None
            _set_dropout(network, 0.0)  # a regression to the teacher's vectors wants no noise
            wanted = F.normalize(torch.from_numpy(texts[1][rows].astype(np.float32)), dim=-1).to(device)
            found = student_embeddings(network, [texts[0][row] for row in rows])
            loss = distillation_loss(found, wanted, settings.similarity_weight)
        else:
            _set_dropout(network, settings.dropout)
            loss = task_loss(network, heads[name], [examples[name][row] for row in rows])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.parameters(), 1.0)
        factor = learning_rate_factor(step, steps=settings.steps, warmup=settings.warmup, decay=settings.decay)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        run.record(step, **{f"{name}_loss": loss.item()})
        out_of_time = settings.max_minutes is not None and time.monotonic() - started > 60 * settings.max_minutes
        if step % settings.save_every == 0 or step == settings.steps or out_of_time:
            run.save({"network": parameters.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        if out_of_time:
            break
    bar.close()
    return {name: head.eval() for name, head in heads.items()}
