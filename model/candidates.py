"""The most likely tokens of a row, and the choice of one of them by a given uniform number.

A full sort of the vocabulary is what sampling on a CPU mostly costs, so a few candidates are sorted first, which
nearly always decides; the rows where it does not are searched by weight classes. Both follow one law: the inverse of
the cumulated distribution, in the order weight descending, id ascending. Does not know requests. Worker process.

Legend: R rows, V vocabulary, C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Search = Callable[[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor], Tensor]
triton_search: Search | None
try:
    from model.triton_search import triton_search
except ImportError:  # builds of torch for some platforms come without Triton
    triton_search = None

FIRST_COUNT = 64

_CLASS_BITS = 16
"""A weight's class is its float32 bits without the last 16: 128 classes between a number and its double."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which candidates a sampled row keeps; [R] each. `top_k == 0`, `top_p >= 1` and `min_p == 0` mean all."""

    top_k: Tensor  # int64
    top_p: Tensor  # float64
    min_p: Tensor  # float64

    def select(self, rows: Tensor) -> "Filters":
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


@dataclass(slots=True)
class Choice:
    """Tokens of the sampled rows; `decided` is false where more candidates must be looked at."""

    tokens: Tensor  # [R] int64
    decided: Tensor  # [R] bool


def pick(weights: Tensor, noise: Tensor, filters: Filters) -> Tensor:
    """A token for each row of weights [R, V], none of them negative, by its number of noise [R] in [0, 1).

    On a GPU the host does not wait to see which rows the first candidates decide.
    """
    choice = choose(weights, noise, filters, FIRST_COUNT)
    if weights.device.type == "cpu":
        open_rows = torch.nonzero(~choice.decided).flatten()
        if len(open_rows):
            found = choose_among_all(weights[open_rows], noise[open_rows], filters.select(open_rows))
            choice.tokens[open_rows] = found
        return choice.tokens
    if triton_search is not None:
        given = (filters.top_k, filters.top_p, filters.min_p)
        return triton_search(weights, noise, given, choice.tokens, choice.decided)
    return torch.where(choice.decided, choice.tokens, choose(weights, noise, filters, weights.shape[1]).tokens)


def choose(weights: Tensor, noise: Tensor, filters: Filters, count: int) -> Choice:
    """Inverse of the cumulated distribution over the `count` largest of weights [R, V], not normalised.

    Order: weight descending, id ascending. Filters in the order of transformers: top_k, then top_p of what is left,
    then min_p; each keeps a leading part. Worked example: weights [4, 1, 3, 2], top_p 0.7: 4 and 3 are kept, since
    0.4 < 0.7 <= 0.4 + 0.3; noise 0.6 * 7 = 4.2 falls past the 4: token 2.
    """
    vocab_size = weights.shape[1]
    count = min(count, vocab_size)
    values, ids = largest(weights, count)  # [R, C]
    values = values.double()
    cumulated = values.cumsum(1)
    limited = (filters.top_k > 0) & (filters.top_k < vocab_size)
    kth = values.gather(1, (filters.top_k.clamp(1, count) - 1)[:, None])
    # What equals the k-th weight is kept too, as transformers does.
    kept = ((values >= kth) | ~limited[:, None]) & (values > 0)
    total = torch.where(limited, (values * kept).sum(1), _row_sums(weights))
    top_p = filters.top_p[:, None]
    kept &= ((cumulated - values) < top_p * total[:, None]) | (top_p >= 1)
    kept &= values >= filters.min_p[:, None] * values[:, :1]
    kept[:, 0] = True
    num_kept = kept.sum(1)
    ends_here = num_kept < count
    mass = torch.where(ends_here, cumulated.gather(1, (num_kept - 1)[:, None])[:, 0], total)
    target = noise * mass
    place = torch.minimum((cumulated <= target[:, None]).sum(1), num_kept - 1)
    unfiltered = ~limited & (filters.top_p >= 1) & (filters.min_p <= 0)
    # All that equals the k-th weight must be among the candidates, or the mass that is kept is not known.
    complete = ~limited | ((filters.top_k < count) & (kth[:, 0] > values[:, -1]))
    decided = (ends_here | (unfiltered & (target < cumulated[:, -1]))) & complete
    # Of weights that equal the last candidate's, some with a lower id may be missing.
    decided &= values.gather(1, place[:, None])[:, 0] > values[:, -1]
    # A row without a number has nothing to look for at any count; the sampler reports it.
    decided |= values[:, 0].isnan() | (count == vocab_size)
    return Choice(ids.gather(1, place[:, None])[:, 0], decided)


def choose_among_all(weights: Tensor, noise: Tensor, filters: Filters) -> Tensor:
    """What `choose` gives with all V candidates, on a CPU: tokens [R], for rows of sound weights."""
    rows = zip(
        weights.numpy(),
        noise.tolist(),
        filters.top_k.tolist(),
        filters.top_p.tolist(),
        filters.min_p.tolist(),
        strict=True,
    )
    return torch.tensor(
        [_choose_one(row, u, top_k=top_k, top_p=top_p, min_p=min_p) for row, u, top_k, top_p, min_p in rows]
    )


def _choose_one(weights: NDArray[np.float32], noise: float, *, top_k: int, top_p: float, min_p: float) -> int:
    """One row's token. A filter keeps a leading part, so it is known by the mass that it keeps."""
    if 0 < top_k < len(weights):
        kth = np.partition(weights, len(weights) - top_k)[len(weights) - top_k]
        weights = np.where(weights >= kth, weights, np.float32(0))
    order = _Order(weights)
    mass = order.total
    if top_p < 1:
        mass = order.mass_through(order.find(top_p * mass, past=False))
    if min_p > 0:
        mass = min(mass, float(weights.sum(where=weights >= min_p * weights.max(), dtype=np.float64)))
    return order.find(min(noise * mass, np.nextafter(mass, 0)), past=True)


class _Order:
    """A row's tokens in the order weight descending, id ascending, sorted only within the classes that are asked for.

    Worked example: weights [4, 1, 3, 2], each a class of its own: the classes from the heaviest cumulate to 4, 7, 9,
    10; a mass of 4.2 is in the second, that of token 2.
    """

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self._weights = weights
        self._classes = weights.view(np.int32) >> _CLASS_BITS
        self._ends = np.bincount(self._classes, weights=weights)[::-1].cumsum()
        self.total = float(self._ends[-1])
        self._rank = 0
        self._members: NDArray[np.int64] = np.zeros(0, np.int64)
        self._cumulated: NDArray[np.float64] = np.zeros(0)

    def find(self, mass: float, *, past: bool) -> int:
        """The first token that brings the cumulated mass past the given one, or only up to it."""
        side: Literal["left", "right"] = "right" if past else "left"
        heaviest_first = min(int(np.searchsorted(self._ends, mass, side=side)), len(self._ends) - 1)
        members = np.flatnonzero(self._classes == len(self._ends) - 1 - heaviest_first)
        members = members[np.argsort(-self._weights[members], kind="stable")]
        before = float(self._ends[heaviest_first - 1]) if heaviest_first else 0.0
        self._members = members
        self._cumulated = before + np.cumsum(self._weights[members], dtype=np.float64)
        self._rank = min(int(np.searchsorted(self._cumulated, mass, side=side)), len(members) - 1)
        return int(members[self._rank])

    def mass_through(self, token: int) -> float:
        """The cumulated mass at the token found last."""
        assert self._members[self._rank] == token
        return float(self._cumulated[self._rank])


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of values [R, V] and their places, [R, count] each; equal ones in order of their place.

    Of several that equal the last one, any may be among them. A plain top-k over all V is slow on a CPU; instead V is
    dealt into columns, and only the columns with the `count` largest maxima are searched: they must hold the `count`
    largest values. Worked example: V = 7, 3 columns of 2: places (0, 3), (1, 4), (2, 5), and place 6 is left over.
    """
    num_rows, size = values.shape
    count = min(count, size)
    depth = int((size / count) ** 0.5)
    if depth < 4:
        if count == size:
            found, places = values.sort(dim=1, descending=True, stable=True)
            return found, places
        return _in_order(*values.topk(count, dim=1, sorted=False))
    num_columns = size // depth
    table = values[:, : depth * num_columns].view(num_rows, depth, num_columns)
    columns = _column_peaks(table).topk(count, dim=1, sorted=False).indices[:, None]  # [R, 1, count]
    steps = torch.arange(depth, device=values.device)[:, None] * num_columns
    found = table.gather(2, columns.expand(-1, depth, -1)).flatten(1)  # [R, depth * count]
    places = (columns + steps).flatten(1)
    left_over = torch.arange(depth * num_columns, size, device=values.device).expand(num_rows, -1)
    found = torch.cat((found, values[:, depth * num_columns :]), dim=1)
    places = torch.cat((places, left_over), dim=1)
    found, best = found.topk(count, dim=1, sorted=False)
    return _in_order(found, places.gather(1, best))


def _column_peaks(table: Tensor) -> Tensor:
    """[R, depth, columns] to [R, columns]."""
    if table.device.type == "cpu":
        # numpy reduces an outer axis several times as fast as torch does.
        return torch.from_numpy(table.numpy().max(axis=1))
    return table.amax(1)


def _in_order(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    places, order = places.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, again)


def _row_sums(weights: Tensor) -> Tensor:
    """float64 [R]. In pieces, so that a row is summed in the same order alone and in a batch."""
    size = weights.shape[1]
    piece = max(int(size**0.5), 1)
    whole = size // piece * piece
    sums = weights[:, :whole].view(len(weights), -1, piece).sum(2)
    return torch.cat((sums, weights[:, whole:]), dim=1).double().cumsum(1)[:, -1]
