"""Task heads of the sentence encoder: one linear map each, on one shared body, and their form on disk.

    heads/<task>/config.json        {"kind", "input", "labels", "problem_type", "temperature", "max_length"}
    heads/<task>/model.safetensors  "weight" [N, E] and "bias" [N]

`kind` "classification": N labels; `input` "cls" reads the last hidden state of the first token, "embedding" the
checkpoint's own sentence embedding (mean of the token states, L2-normalized). Probabilities are
softmax((states @ weight.T + bias) / temperature); `problem_type` is "single_label_classification".
`kind` "span": N = 2, `input` "tokens": row 0 scores every token as the start, row 1 as the end of an answer, over the
pair "[CLS] question [SEP] context [SEP]" with type ids 0 and 1; the answer is the best start <= end within the context.
`kind` "token": N labels, `input` "tokens": every token's label, probabilities as for "classification".
Runs in the training process; the service reads the files with its own code.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from model.training.networks import Bert
from model.training.teacher import mean_pool

HeadInput = Literal["cls", "embedding", "tokens"]


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What a head reads and says."""

    kind: Literal["classification", "span", "token"]
    input: HeadInput
    labels: tuple[str, ...]
    max_length: int
    temperature: float = 1.0
    problem_type: str = "single_label_classification"


class Head(nn.Module):
    """hidden [B, L, E], mask [B, L] -> logits [B, N] (classification) or [B, L, N] (span, token), float32."""

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        outputs = 2 if config.kind == "span" else len(config.labels)
        self.weight = nn.Parameter(torch.randn(outputs, hidden_size) * 0.02)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the head reads: [B, E], or every token's [B, L, E]."""
        hidden = hidden.float()
        if self.config.input == "cls":
            return hidden[:, 0]
        if self.config.input == "embedding":
            return F.normalize(mean_pool(hidden, mask), dim=-1)
        return hidden

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return F.linear(self.states(hidden, mask), self.weight, self.bias)


def save_head(head: Head, folder: Path, *, temperature: float) -> None:
    """Write one head; weights as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = head.config
    document = {
        "kind": config.kind,
        "input": config.input,
        "labels": list(config.labels),
        "problem_type": config.problem_type,
        "temperature": round(temperature, 4),
        "max_length": config.max_length,
    }
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    tensors = {"weight": head.weight.detach().half().cpu(), "bias": head.bias.detach().half().cpu()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_head(folder: Path) -> Head:
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    config = HeadConfig(
        kind=raw["kind"],
        input=raw["input"],
        labels=tuple(raw["labels"]),
        max_length=raw["max_length"],
        temperature=raw["temperature"],
        problem_type=raw["problem_type"],
    )
    head = Head(config, tensors["weight"].shape[1])
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head.eval()


def head_states(network: Bert, head: Head, ids: list[list[int]], *, batch_size: int = 32) -> Tensor:
    """What a classification head reads of each text, [len(ids), E], float32."""
    output = torch.empty(len(ids), network.shape.hidden_size)
    for rows, states in _batched_states(network, head, ids, batch_size):
        output[rows] = states
    return output


def head_token_states(network: Bert, head: Head, ids: list[list[int]], *, batch_size: int = 32) -> list[Tensor]:
    """What a token head reads of each text, [its tokens, E], float32."""
    output = [torch.empty(0)] * len(ids)
    for rows, states in _batched_states(network, head, ids, batch_size):
        for row, padded in zip(rows, states, strict=True):
            output[row] = padded[: len(ids[row])]
    return output


@torch.no_grad()
def _batched_states(
    network: Bert, head: Head, ids: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Some rows and what the head reads of them, texts of like length together, until all were there."""
    device = next(network.parameters()).device
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = max(len(ids[row]) for row in rows)
        batch = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows], device=device)
        mask = torch.tensor([[True] * len(ids[row]) + [False] * (longest - len(ids[row])) for row in rows])
        yield rows, head.states(network(batch, mask.to(device)), mask.to(device)).cpu()


@torch.inference_mode()
def head_logits(network: Bert, head: Head, ids: list[list[int]]) -> Tensor:
    """Classification logits [len(ids), N], float32, before the temperature."""
    return F.linear(head_states(network, head, ids), head.weight.cpu(), head.bias.cpu())


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature that minimizes the log loss on held-back training rows (arXiv:1706.04599)."""
    candidates = torch.logspace(-1, 1, 81)
    losses = torch.stack([F.cross_entropy(logits / temperature, targets) for temperature in candidates])
    return float(candidates[int(losses.argmin())])
