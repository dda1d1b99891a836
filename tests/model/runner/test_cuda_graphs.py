"""What of CUDA graphs is arithmetic: the ladder of sizes, and rows that pad a batch without touching its cache."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from model import cuda_graphs
from model.attention.attend import CachedAttend
from model.attention.cpu import CpuAttention
from model.batch import Row, SamplingParams
from model.cuda_graphs import LADDER, DecodeBuffers, ladder_size
from model.kv_cache import KVCache
from model.step_inputs import Fed, StepInputs, make_inputs

NULL_BLOCK = 15


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (256, 256), (257, None)])
def test_a_batch_runs_in_the_least_size_that_holds_it(rows, size):
    assert ladder_size(rows) == size


def test_the_ladder_rises():
    assert list(LADDER) == sorted(set(LADDER))


def test_padding_rows_write_to_the_null_block_and_change_no_result(run_folder, saved_model):
    runner = run_folder(saved_model("llama")[0])
    cache, network = runner.kv_cache, runner.network
    assert isinstance(cache, KVCache)
    sampling = SamplingParams(max_tokens=9)
    rows = [Row(i, [3 + i], 5 * i, list(range(10 * i, 10 * i + 6)), sampling, True, [], []) for i in range(3)]
    for tensor in cache.keys + cache.values:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in cache.keys + cache.values]
    inputs = make_inputs(rows, cache.block_size)
    # As a graph reads it: into tensors for any length, that hold what the steps before left.
    buffers = DecodeBuffers(
        8, num_blocks=20, context_length=80, null_block=cache.null_block, block_size=cache.block_size,
        device=torch.device("cpu"),
    )  # fmt: skip
    for tensor in (buffers.layout.block_tables, buffers.layout.slots, buffers.ids, buffers.positions):
        tensor.random_(0, 17)
    buffers.fill(inputs)
    results, caches = [], []
    for ids, positions, layout in (
        (torch.from_numpy(inputs.ids), torch.from_numpy(inputs.positions), inputs.layout(torch.device("cpu"))),
        (buffers.ids, buffers.positions, buffers.layout),
    ):
        for tensor, old in zip(cache.keys + cache.values, before, strict=True):
            tensor.copy_(old)
        with torch.inference_mode():
            results.append(network(ids, positions, CachedAttend(cache, layout, CpuAttention())))
        caches.append([tensor[: cache.num_blocks].clone() for tensor in cache.keys + cache.values])
    torch.testing.assert_close(results[1][:3], results[0])
    for plain, other in zip(*caches, strict=True):
        torch.testing.assert_close(plain, other)


def test_tokens_feed_the_rows_that_they_are_for(make_buffers):
    buffers = make_buffers(4)
    inputs = step_of([7, 8, 9], tables=[[1], [2], [3]])
    tokens = torch.tensor([70, 80, 90])
    buffers.fill(inputs, Fed(np.array([0, 1, 2]), np.array([0, 1, 2]), tokens))
    assert buffers.ids.tolist() == [70, 80, 90, 0]
    buffers.fill(inputs, Fed(np.array([0, 2]), np.array([2, 0]), tokens))
    assert buffers.ids.tolist() == [90, 8, 70, 0]
    buffers.fill(inputs)
    assert buffers.ids.tolist() == [7, 8, 9, 0]


def test_tables_follow_the_rows(make_buffers):
    """They are sent only where they have changed."""
    buffers = make_buffers(2)
    found = []
    for tables in ([[1, 4], [2, 3]], [[1, 4], [2, 3]], [[5, 6]], [[5, 6], [2, 3]]):
        buffers.fill(step_of([7] * len(tables), tables=tables))
        found.append(buffers.layout.block_tables[:, :2].tolist())
    assert found == [[[1, 4], [2, 3]], [[1, 4], [2, 3]], [[5, 6], [NULL_BLOCK] * 2], [[5, 6], [2, 3]]]


def test_a_narrow_step_leaves_nothing_that_a_wide_one_reads(make_buffers):
    buffers = make_buffers(1)
    for table in ([1, 2, 3], [4], [4, 5, 6]):
        buffers.fill(step_of([7], tables=[table]))
        assert buffers.layout.block_tables[0, : len(table)].tolist() == table


def test_tables_that_did_not_arrive_are_sent_again(make_buffers, monkeypatch):
    buffers = make_buffers(1)
    buffers.fill(step_of([7], tables=[[1, 2]]))
    send = cuda_graphs.on_device

    def fail(*_arguments: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda_graphs, "on_device", fail)
    with pytest.raises(torch.OutOfMemoryError):
        buffers.fill(step_of([7], tables=[[3, 4]]))
    monkeypatch.setattr(cuda_graphs, "on_device", send)
    buffers.fill(step_of([7], tables=[[3, 4]]))
    assert buffers.layout.block_tables[0, :2].tolist() == [3, 4]


def test_inputs_of_single_tokens_are_those_that_longer_rows_have():
    """Rows of one token each are made in a way of their own."""
    sampling = SamplingParams(max_tokens=9)
    rows = [
        Row(i, [3 + i], start, list(range(7 * i, 7 * i + 1 + start // 4)), sampling, True, [], [])
        for i, start in enumerate([0, 3, 4, 17])
    ]
    long = Row(9, [1, 2], 6, [90, 91], sampling, True, [], [])
    alone, among = make_inputs(rows, 4), make_inputs([*rows, long], 4)
    for name in ("ids", "positions", "slots", "context_lens"):
        assert np.array_equal(getattr(alone, name), getattr(among, name)[: len(rows)]), name
    assert np.array_equal(alone.query_starts, among.query_starts[:-1])
    assert np.array_equal(alone.block_tables, among.block_tables[:-1])
    assert alone.decodes_only
    assert not among.decodes_only


def step_of(ids: list[int], *, tables: list[list[int]]) -> StepInputs:
    count = len(ids)
    return StepInputs(
        ids=np.array(ids), positions=np.arange(count), slots=np.arange(count), query_starts=np.arange(count + 1),
        context_lens=np.arange(count) + 1, block_tables=np.array(tables, np.int32),
    )  # fmt: skip


@pytest.fixture
def make_buffers() -> Callable[[int], DecodeBuffers]:
    return lambda size: DecodeBuffers(
        size, num_blocks=4, context_length=16, null_block=NULL_BLOCK, block_size=4, device=torch.device("cpu")
    )
