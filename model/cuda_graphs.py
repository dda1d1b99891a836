"""Captured decode steps for CUDA: a ladder of batch sizes, each recorded once and replayed with new inputs.

A decode step of a small model is hundreds of short kernels, and launching them costs more than running them. A batch
is padded to the next size of the ladder with rows that write to the null block, which nobody reads. The choice of the
size, the padding and the filling of what is read run anywhere; only capture and replay need CUDA.
Runs in the worker process, main thread.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.attend import CachedAttend
from model.attention.interface import AttentionBackend, PagedLayout
from model.decoder import Decoder
from model.experts import SparseMLP
from model.kv_cache import KVCache
from model.step_inputs import Fed, StepInputs
from model.transfer import HostNumbers, on_device, upload

LADDER = (1, 2, 4, 8, *range(16, 257, 16))
MOST_LOGITS = 16
"""Rows up to which the projection to logits is recorded too: each size keeps a float32 of each id for each row."""


def ladder_size(num_rows: int) -> int | None:
    """The least size of the ladder that holds the rows; None past its end.

    Worked example: 5 rows run in the graph of 8, 17 in that of 32, 300 in none.
    """
    place = bisect_left(LADDER, num_rows)
    return LADDER[place] if place < len(LADDER) else None


def can_be_captured(network: Decoder) -> bool:
    """Whether no step of it waits for the device: experts one after another ask which of them have rows."""
    return not any(isinstance(module, SparseMLP) for module in network.modules())


class DecodeBuffers:
    """What a recorded step of B rows reads. Tables have room for the longest text; past a row's own blocks they hold
    what earlier steps left there, which nobody reads. Rows that pad a batch have the null block.

    Ids, positions, slots and context lengths are the rows of [4, B] numbers, so that one copy brings them; the lengths
    are int32, in the first half of their row.
    """

    def __init__(
        self, size: int, *, num_blocks: int, context_length: int, null_block: int, block_size: int, device: torch.device
    ) -> None:
        self._numbers = torch.zeros((4, size), dtype=torch.int64, device=device)
        # Two, since the step before may not have been begun when the next is made.
        self._hosts = [HostNumbers((4, size), device) for _ in range(2)]
        self._null_block = null_block
        self._null_slot = null_block * block_size
        self._tables: NDArray[np.int32] | None = None
        """The tables that are on the device."""
        self.ids, self.positions, slots, lens = self._numbers
        self.layout = PagedLayout(
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=lens.view(torch.int32)[:size],
            block_tables=torch.full((size, num_blocks), null_block, dtype=torch.int32, device=device),
            slots=slots,
            max_query_len=1,
            # The graph is replayed for any length up to the model's, and this number is recorded in it.
            max_context_len=context_length,
        )

    def fill(self, inputs: StepInputs, fed: Fed | None = None) -> None:
        """Queues the copies of a step of at most B rows, whose ids are among the inputs but for those that are fed."""
        count, size = inputs.num_rows, len(self.ids)
        host = self._hosts[0]
        self._hosts.reverse()
        ids, positions, slots, lens = host.writable()
        lens = lens.view(np.int32)[:size]
        for target, values, filling in (
            (ids, inputs.ids, 0),
            (positions, inputs.positions, 0),
            (slots, inputs.slots, self._null_slot),
            (lens, inputs.context_lens, 1),
        ):
            target[:count] = values
            target[count:] = filling
        host.send(self._numbers)
        self._fill_tables(inputs.block_tables)
        if fed is not None:
            self._feed(fed)

    def _fill_tables(self, tables: NDArray[np.int32]) -> None:
        if self._tables is not None and np.array_equal(tables, self._tables):
            return
        padded = np.full((len(self.ids), tables.shape[1]), self._null_block, np.int32)
        padded[: len(tables)] = tables
        self.layout.block_tables[:, : tables.shape[1]].copy_(on_device(padded, self.ids.device))
        self._tables = tables  # only now: what is before may raise

    def _feed(self, fed: Fed) -> None:
        order = np.arange(len(fed.places))
        if np.array_equal(fed.places, order) and np.array_equal(fed.sources, order):  # the same rows go on
            self.ids[: len(fed.places)].copy_(fed.tokens[: len(fed.places)])
            return
        places, sources = upload([fed.places, fed.sources], self.ids.device)
        self.ids.index_copy_(0, places, fed.tokens.index_select(0, sources))


@dataclass(frozen=True, slots=True)
class _Captured:
    """A recorded step: the tensors it reads and those it writes are always the same."""

    graph: torch.cuda.CUDAGraph
    buffers: DecodeBuffers
    hidden: Tensor
    logits: Tensor | None


class DecodeGraphs:
    """Graphs of one decoder, captured when a size is first needed."""

    def __init__(self, network: Decoder, kv_cache: KVCache, backend: AttentionBackend, context_length: int) -> None:
        self._network = network
        self._cache = kv_cache
        self._backend = backend
        self._context_length = context_length
        self._num_blocks = -(-context_length // kv_cache.block_size)
        self._captured: dict[int, _Captured] = {}
        # One pool of memory for all sizes: graphs are replayed one at a time.
        self._pool = torch.cuda.graph_pool_handle() if kv_cache.device.type == "cuda" else None

    def fits(self, inputs: StepInputs) -> bool:
        return ladder_size(inputs.num_rows) is not None and inputs.block_tables.shape[1] <= self._num_blocks

    def run(self, inputs: StepInputs, fed: Fed | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, E] of a step that `fits`, and logits [B, V] if the rows are few; good until the next."""
        size = ladder_size(inputs.num_rows)
        assert size is not None
        found = self._captured.get(size)
        if found is None:
            found = self._captured[size] = self._capture(size, inputs)
        found.buffers.fill(inputs, fed)
        found.graph.replay()
        logits = found.logits
        return found.hidden[: inputs.num_rows], None if logits is None else logits[: inputs.num_rows]

    def _capture(self, size: int, inputs: StepInputs) -> _Captured:
        device = self._cache.device
        buffers = DecodeBuffers(
            size,
            num_blocks=self._num_blocks,
            context_length=self._context_length,
            null_block=self._cache.null_block,
            block_size=self._cache.block_size,
            device=device,
        )
        buffers.fill(inputs)
        side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # Once outside the graph: kernels are compiled and libraries allocate their workspaces on first use.
            self._step(buffers)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's may allocate memory for another checkpoint meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden, logits = self._step(buffers)
        return _Captured(graph, buffers, hidden, logits)

    def _step(self, buffers: DecodeBuffers) -> tuple[Tensor, Tensor | None]:
        attend = CachedAttend(self._cache, buffers.layout, self._backend)
        hidden: Tensor = self._network(buffers.ids, buffers.positions, attend)
        return hidden, self._network.logits(hidden) if len(hidden) <= MOST_LOGITS else None
