"""One vector per text from the states of its tokens, over packed texts.

The modes and their order are sentence-transformers' (`Pooling`), sums are taken in float32. Runs in the worker process.

Legend: T tokens packed in the step, B texts, E hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.embedding_config import Pooling, PoolingMode
from model.ops import library
from model.transfer import on_device


@dataclass(frozen=True, slots=True)
class Span:
    """A text's tokens in the step: [start, end), of which pooling leaves out the first `skipped`."""

    start: int
    end: int
    skipped: int = 0

    @property
    def first(self) -> int:
        return min(self.start + self.skipped, self.end)


def pool(hidden: Tensor, spans: Sequence[Span], pooling: Pooling) -> Tensor:
    """hidden [T, E]; returns float32 [B, modes * E]."""
    vectors = [POOLERS[mode](hidden, spans).float() for mode in pooling.modes]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


def _first(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    return hidden[[span.first if span.first < span.end else span.start for span in spans]]


def _last(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    return hidden[[span.end - 1 for span in spans]]


def _max(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.stack([_kept(hidden, span).amax(dim=0) for span in spans])


def _sum(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    if hidden.device.type != "cpu":
        return _sum_at_once(hidden, spans)
    if library.sums(hidden):
        begins, ends = torch.from_numpy(np.array([(span.first, span.end) for span in spans], np.int64).T.copy())
        sums: Tensor = torch.ops.slimpajama.sum_texts(hidden, begins, ends)
        return sums
    return torch.stack([_kept(hidden, span).sum(dim=0, dtype=torch.float32) for span in spans])


def _sum_at_once(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    """The same in one pass, where a launch for each text would cost more than the sums."""
    lengths = [span.end - span.first for span in spans]
    places = np.concatenate([np.arange(span.first, span.end) for span in spans])
    rows = hidden
    if len(places) < len(hidden) or (np.diff(places) != 1).any():
        rows = hidden.index_select(0, on_device(places, hidden.device))
    counts = on_device(np.array(lengths, np.int64), hidden.device)
    return torch.segment_reduce(rows.float(), "sum", lengths=counts, unsafe=True, initial=0)


def _lengths(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    lengths = [max(span.end - span.first, 1e-9) for span in spans]
    return on_device(np.array(lengths, np.float32)[:, None], hidden.device)


def _mean(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    return _sum(hidden, spans) / _lengths(hidden, spans)


def _mean_sqrt(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    return _sum(hidden, spans) / _lengths(hidden, spans).sqrt()


def _weighted_mean(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    """Weights 1, 2, ... from a text's first token; leaving out a prompt leaves the other tokens' weights."""
    vectors = []
    for span in spans:
        weights = torch.arange(
            span.first - span.start + 1, span.end - span.start + 1, dtype=torch.float32, device=hidden.device
        )
        vectors.append(weights @ _kept(hidden, span).float() / weights.sum().clamp(min=1e-9))
    return torch.stack(vectors)


def _kept(hidden: Tensor, span: Span) -> Tensor:
    return hidden[span.first : span.end]


POOLERS: Mapping[PoolingMode, Callable[[Tensor, Sequence[Span]], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
