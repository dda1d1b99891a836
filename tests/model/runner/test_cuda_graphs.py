"""What of CUDA graphs is arithmetic: the ladder of sizes, and rows that pad a batch without touching its cache."""

import pytest
import torch

from model.attention.attend import CachedAttend
from model.attention.cpu import CpuAttention
from model.batch import Row, SamplingParams
from model.cuda_graphs import LADDER, DecodeBuffers, ladder_size, pad_inputs
from model.kv_cache import KVCache
from model.step_inputs import make_inputs


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
    padded = pad_inputs(inputs, 8, null_block=cache.null_block, block_size=cache.block_size)
    assert padded.num_rows == len(padded.ids) == len(padded.slots) == 8
    assert padded.decodes_only
    # As a graph reads it: into tensors for any length, that hold what the steps before left.
    buffers = DecodeBuffers.make(8, num_blocks=20, context_length=80, device=torch.device("cpu"))
    for tensor in (buffers.layout.block_tables, buffers.layout.slots, buffers.ids, buffers.positions):
        tensor.random_(0, 17)
    buffers.fill(padded, torch.from_numpy(inputs.ids))
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
