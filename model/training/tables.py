"""Texts and examples as tensors on the device, made once: a batch is one gather, with no Python per token.

B rows, L tokens of the longest, rounded up to eight. Knows ids, not texts. Runs in the training process.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

Ids = Sequence[int] | NDArray[np.int32]
MULTIPLE = 8


class TokenTable:
    """Rows of ids of different lengths, flat on the device; a batch is padded with 0."""

    def __init__(self, rows: Sequence[Ids], device: torch.device | str) -> None:
        self.lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
        self._flat = torch.from_numpy(flat).to(device)
        lengths = torch.from_numpy(self.lengths)
        self._lengths = lengths.to(device)
        self._starts = (lengths.cumsum(0) - lengths).to(device)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self._flat.device

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ids, mask), both [B, L]; the mask is true where a token is."""
        index = torch.tensor(rows, device=self.device)
        longest = int(self.lengths[list(rows)].max())
        positions = torch.arange(-(-longest // MULTIPLE) * MULTIPLE, device=self.device)
        mask = positions < self._lengths[index, None]  # [B, L]
        places = (self._starts[index, None] + positions).clamp(max=len(self._flat) - 1)
        return self._flat[places].long().masked_fill(~mask, 0), mask


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], *, chunk: int = 16384) -> list[NDArray[np.int32]]:
    """The ids of every text, on all cores."""
    found: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), chunk):
        encodings = tokenizer.encode_batch_fast(list(texts[start : start + chunk]))
        found += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    return found


def batches_by_length(lengths: NDArray[np.int64], *, batch_tokens: int, seed: int) -> list[NDArray[np.int64]]:
    """All rows once, in batches of at most `batch_tokens` padded tokens, rows of like length together, order seeded."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    pool = max(2048, 16 * batch_tokens // max(1, int(lengths.mean())))
    batches: list[NDArray[np.int64]] = []
    for first in range(0, len(order), pool):
        part = order[first : first + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        start = 0
        while start < len(part):
            ahead = lengths[part[start : start + batch_tokens]]
            padded = ahead * np.arange(1, len(ahead) + 1)
            stop = start + max(1, int(np.searchsorted(padded, batch_tokens, side="right")))
            batches.append(part[start:stop])
            start = stop
    return [batches[index] for index in rng.permutation(len(batches)).tolist()]


class EndlessBatches:
    """Epoch after epoch of `batches_by_length`; `rows(step)` depends on the step alone."""

    def __init__(self, lengths: NDArray[np.int64], *, batch_tokens: int, seed: int) -> None:
        self._lengths, self._batch_tokens, self._seed = lengths, batch_tokens, seed
        self._drawn: list[NDArray[np.int64]] = []
        self._epochs = 0

    def rows(self, step: int) -> list[int]:
        while step >= len(self._drawn):
            seed = self._seed + self._epochs
            self._drawn += batches_by_length(self._lengths, batch_tokens=self._batch_tokens, seed=seed)
            self._epochs += 1
        rows: list[int] = self._drawn[step].tolist()
        return rows
