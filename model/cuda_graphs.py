"""Captured decode steps for CUDA: a ladder of batch sizes, each recorded once and replayed with new inputs.

A decode step of a small model is hundreds of short kernels, and launching them costs more than running them. A batch
is padded to the next size of the ladder with rows that write to the null block, which nobody reads. The choice of the
size and the padding are plain arithmetic and run anywhere; only capture and replay need CUDA.
Runs in the worker process, main thread.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.attention.attend import CachedAttend
from model.attention.interface import AttentionBackend, PagedLayout
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.step_inputs import StepInputs
from model.transfer import upload

LADDER = (1, 2, 4, 8, *range(16, 257, 16))


def ladder_size(num_rows: int) -> int | None:
    """The least size of the ladder that holds the rows; None past its end.

    Worked example: 5 rows run in the graph of 8, 17 in that of 32, 300 in none.
    """
    place = bisect_left(LADDER, num_rows)
    return LADDER[place] if place < len(LADDER) else None


def pad_inputs(inputs: StepInputs, size: int, *, null_block: int, block_size: int) -> StepInputs:
    """The same step with `size` rows; those added read and write the null block."""
    extra = size - inputs.num_rows
    tables = np.pad(inputs.block_tables, ((0, extra), (0, 0)), constant_values=null_block)
    return StepInputs(
        ids=np.pad(inputs.ids, (0, extra)),
        positions=np.pad(inputs.positions, (0, extra)),
        slots=np.pad(inputs.slots, (0, extra), constant_values=null_block * block_size),
        query_starts=np.arange(size + 1),
        context_lens=np.pad(inputs.context_lens, (0, extra), constant_values=1),
        block_tables=tables,
    )


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """What a recorded step of B rows reads. Tables have room for the longest text; past a row's own blocks they hold
    what earlier steps left there, which nobody reads."""

    ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    layout: PagedLayout

    @classmethod
    def make(cls, size: int, *, num_blocks: int, context_length: int, device: torch.device) -> "DecodeBuffers":
        layout = PagedLayout(
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=torch.ones(size, dtype=torch.int32, device=device),
            block_tables=torch.zeros((size, num_blocks), dtype=torch.int32, device=device),
            slots=torch.zeros(size, dtype=torch.int64, device=device),
            max_query_len=1,
            # The graph is replayed for any length up to the model's, and this number is recorded in it.
            max_context_len=context_length,
        )
        ids, positions = torch.zeros((2, size), dtype=torch.int64, device=device)
        return cls(ids, positions, layout)

    def fill(self, inputs: StepInputs, ids: Tensor) -> None:
        """Queues the copies of a step of B rows; ids [at most B] are on the device already."""
        positions, slots, context_lens, tables = upload(
            [inputs.positions, inputs.slots, inputs.context_lens.astype(np.int32), inputs.block_tables],
            self.ids.device,
        )
        self.ids[: len(ids)].copy_(ids)
        self.positions.copy_(positions)
        self.layout.slots.copy_(slots)
        self.layout.context_lens.copy_(context_lens)
        self.layout.block_tables[:, : tables.shape[1]].copy_(tables)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A recorded step: the tensors it reads and the one it writes are always the same."""

    graph: torch.cuda.CUDAGraph
    buffers: DecodeBuffers
    hidden: Tensor

    def replay(self, inputs: StepInputs, ids: Tensor) -> Tensor:
        self.buffers.fill(inputs, ids)
        self.graph.replay()
        return self.hidden


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

    def run(self, inputs: StepInputs, ids: Tensor) -> Tensor:
        """Hidden states [B, E] of a step that `fits`, with its ids [B] on the device; good until the next call."""
        size = ladder_size(inputs.num_rows)
        assert size is not None
        padded = pad_inputs(inputs, size, null_block=self._cache.null_block, block_size=self._cache.block_size)
        if size not in self._captured:
            self._captured[size] = self._capture(padded, ids)
        return self._captured[size].replay(padded, ids)[: inputs.num_rows]

    def _capture(self, inputs: StepInputs, step_ids: Tensor) -> _Captured:
        device = self._cache.device
        buffers = DecodeBuffers.make(
            inputs.num_rows, num_blocks=self._num_blocks, context_length=self._context_length, device=device
        )
        buffers.fill(inputs, step_ids)
        ids, positions = buffers.ids, buffers.positions
        attend = CachedAttend(self._cache, buffers.layout, self._backend)
        side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # Once outside the graph: kernels are compiled and libraries allocate their workspaces on first use.
            self._network(ids, positions, attend)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's may allocate memory for another checkpoint meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._network(ids, positions, attend)
        return _Captured(graph, buffers, hidden)
