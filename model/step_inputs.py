"""A step's rows as flat arrays: ids, positions, cache slots and block tables, built for all rows at once.

Knows the layout of the paged cache, not the networks and not sampling. Runs in the worker process.

Legend: T tokens packed in the step, B rows, N blocks in the longest block table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.interface import PackedLayout, PagedLayout
from model.batch import Row
from model.transfer import upload

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a decoder's forward pass reads, on the host; worked example in `PagedLayout`."""

    ids: Ints  # [T]
    positions: Ints  # [T]
    slots: Ints  # [T]
    query_starts: Ints  # [B + 1]
    context_lens: Ints  # [B]
    block_tables: NDArray[np.int32]  # [B, N]

    @property
    def num_rows(self) -> int:
        return len(self.context_lens)

    @property
    def decodes_only(self) -> bool:
        """Whether every row computes exactly one token."""
        return len(self.ids) == self.num_rows

    @property
    def row_ends(self) -> Ints:
        """[B]: each row's last token in the step."""
        return self.query_starts[1:] - 1

    def layout(self, device: torch.device) -> PagedLayout:
        starts, lens = self.query_starts.astype(np.int32), self.context_lens.astype(np.int32)
        starts_there, lens_there, tables, slots = upload([starts, lens, self.block_tables, self.slots], device)
        return PagedLayout(
            query_starts=starts_there,
            context_lens=lens_there,
            block_tables=tables,
            slots=slots,
            max_query_len=int(np.diff(self.query_starts).max()),
            max_context_len=int(self.context_lens.max()),
        )


@dataclass(frozen=True, slots=True)
class Fed:
    """Which of a step's rows take their token from the last step's on the device, and where it is among those."""

    places: Ints  # [N]
    sources: Ints  # [N]
    tokens: Tensor  # int64


def make_inputs(rows: Sequence[Row], block_size: int) -> StepInputs:
    lens = _lens([row.token_ids for row in rows])
    starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
    if (lens == 1).all():
        return _make_decode_inputs(rows, starts, block_size)
    query_starts = np.concatenate(([0], np.cumsum(lens)))
    num_tokens = int(query_starts[-1])
    ids = np.fromiter(chain.from_iterable([row.token_ids for row in rows]), np.int64, num_tokens)
    row_of = np.repeat(np.arange(len(rows)), lens)
    positions = np.arange(num_tokens) - (query_starts[:-1] - starts)[row_of]
    tables = block_tables([row.block_ids for row in rows])
    slots = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return StepInputs(
        ids=ids,
        positions=positions,
        slots=slots,
        query_starts=query_starts,
        context_lens=starts + lens,
        block_tables=tables,
    )


def _make_decode_inputs(rows: Sequence[Row], starts: Ints, block_size: int) -> StepInputs:
    """The same where every row has a single token, as most steps do."""
    slots = [row.block_ids[row.start // block_size] * block_size + row.start % block_size for row in rows]
    return StepInputs(
        ids=np.array([row.token_ids[0] for row in rows], np.int64),
        positions=starts,
        slots=np.array(slots, np.int64),
        query_starts=np.arange(len(rows) + 1),
        context_lens=starts + 1,
        block_tables=block_tables([row.block_ids for row in rows]),
    )


def block_tables(lists: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """[B, N], rows padded with 0."""
    lens = _lens(lists)
    tables = np.zeros((len(lists), int(lens.max())), np.int32)
    flat = np.fromiter(chain.from_iterable(lists), np.int32, int(lens.sum()))
    tables[np.arange(tables.shape[1]) < lens[:, None]] = flat
    return tables


def cross_layout(rows: Sequence[Row], query_starts: Ints, device: torch.device) -> PagedLayout:
    """Every row's queries over all of its encoded source, which was written when it was encoded."""
    lens = _lens([row.encoder_ids for row in rows])
    tables = block_tables([row.cross_block_ids for row in rows])
    starts_there, lens_there, tables_there = upload(
        [query_starts.astype(np.int32), lens.astype(np.int32), tables], device
    )
    return PagedLayout(
        query_starts=starts_there,
        context_lens=lens_there,
        block_tables=tables_there,
        slots=torch.zeros(0, dtype=torch.int64, device=device),
        max_query_len=int(np.diff(query_starts).max()),
        max_context_len=int(lens.max()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInputs:
    """The sources to encode in a step, end to end, and the slots for their cross-attention keys and values."""

    ids: Ints  # [T]
    positions: Ints  # [T]
    slots: Ints  # [T]
    starts: Ints  # [B + 1]

    def layout(self, device: torch.device) -> PackedLayout:
        lens = np.diff(self.starts)
        return PackedLayout(starts=upload([self.starts.astype(np.int32)], device)[0], max_len=int(lens.max()))


def make_source_inputs(rows: Sequence[Row], block_size: int) -> SourceInputs:
    lens = _lens([row.encoder_ids for row in rows])
    starts = np.concatenate(([0], np.cumsum(lens)))
    ids = np.fromiter(chain.from_iterable([row.encoder_ids for row in rows]), np.int64, int(starts[-1]))
    row_of = np.repeat(np.arange(len(rows)), lens)
    positions = np.arange(len(ids)) - starts[:-1][row_of]
    tables = block_tables([row.cross_block_ids for row in rows])
    slots = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return SourceInputs(ids=ids, positions=positions, slots=slots, starts=starts)


def _lens(lists: Sequence[Sequence[int]]) -> Ints:
    return np.fromiter(map(len, lists), np.int64, len(lists))
