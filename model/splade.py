"""Sparse vectors over the vocabulary from a masked language model's logits, over packed texts.

The weights are those of sentence-transformers' `SpladePooling`: all of a text's tokens count, special ones and a
prompt's included. Logits are made for so many tokens at a time as bounds their memory, and only entries that are not
zero leave the device. Runs in the worker process.

Legend: T tokens packed in the step, E hidden size, V vocabulary, B texts, N entries of a text that are not zero.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.errors import CheckpointError
from model.heads import Head
from model.pooling import Span
from model.splade_config import Splade

MAX_LOGITS = 1 << 24
"""Made at once: 64 MiB of float32, which is 549 tokens of BERT's vocabulary and 67 of XLM-RoBERTa's."""
MAX_VOCABULARY = 1 << 24
"""Up to here float32 holds every id exactly."""


class SpladePooling(nn.Module):
    """The head over the vocabulary, and what becomes of its logits."""

    def __init__(self, head: Head, config: Splade) -> None:
        super().__init__()
        self.head = head
        self.config = config
        vocab_size = head.config.num_outputs
        if vocab_size > MAX_VOCABULARY:
            raise CheckpointError(f"a sparse encoder's vocabulary has {vocab_size:,} entries; the limit is 16,777,216")
        self.max_tokens = max(1, MAX_LOGITS // vocab_size)

    def forward(self, hidden: Tensor, spans: Sequence[Span]) -> list[NDArray[np.float32]]:
        """hidden [T, E]; returns for each text float32 [2, N]: the entries' ids, ascending, and their weights.

        Waits for the device.
        """
        found: list[NDArray[np.float32]] = []
        for texts in _together(spans, self.max_tokens):
            found += self._entries(self._weights([hidden[span.start : span.end] for span in texts]))
        return found

    def _weights(self, texts: Sequence[Tensor]) -> Tensor:
        """Short texts together, or a long one in pieces: [n, E] each; returns [B, V]."""
        if len(texts) > 1:
            return self._pooled(torch.cat(list(texts)), [len(text) for text in texts])
        pieces = torch.split(texts[0], self.max_tokens)
        weights = self._pooled(pieces[0], [len(pieces[0])])
        for piece in pieces[1:]:
            more = self._pooled(piece, [len(piece)])
            weights = torch.maximum(weights, more) if self.config.strategy == "max" else weights + more
        return weights

    def _pooled(self, states: Tensor, lengths: list[int]) -> Tensor:
        """states [T, E] of texts of these lengths; returns [B, V]."""
        logits: Tensor = self.head(states)  # [T, V]
        if self.config.strategy == "max":
            # The activation keeps the order of logits: it is taken of the largest alone.
            return self._activated(torch.stack([rows.amax(0) for rows in torch.split(logits, lengths)]))
        return torch.stack([rows.sum(0) for rows in torch.split(self._activated(logits), lengths)])

    def _activated(self, logits: Tensor) -> Tensor:
        """In place."""
        weights = logits.relu_().log1p_()
        return weights.log1p_() if self.config.activation == "log1p_relu" else weights

    def _entries(self, weights: Tensor) -> list[NDArray[np.float32]]:
        """weights [B, V]; returns float32 [2, N] of each text."""
        limit = self.config.max_entries
        if limit is not None and limit < weights.shape[1]:
            largest, places = weights.topk(limit, dim=1)
            weights = torch.zeros_like(weights).scatter_(1, places, largest)
        texts, ids = weights.nonzero(as_tuple=True)
        counts = torch.bincount(texts, minlength=len(weights)).tolist()
        entries = torch.stack((ids.float(), weights[texts, ids])).cpu().numpy()  # [2, all N]
        return np.split(entries, np.cumsum(counts)[:-1], axis=1)


def _together(spans: Sequence[Span], max_tokens: int) -> Iterator[list[Span]]:
    """Consecutive texts that have so many tokens together, or a longer one alone.

    Worked example: lengths 3, 4, 9, 2 and 1 at 8 tokens go as 3 and 4, 9, 2 and 1.
    """
    texts: list[Span] = []
    num_tokens = 0
    for span in spans:
        length = span.end - span.start
        if texts and num_tokens + length > max_tokens:
            yield texts
            texts, num_tokens = [], 0
        texts.append(span)
        num_tokens += length
    if texts:
        yield texts
