"""The largest step that may come: it is what the limits say, and every kind of network runs it."""

import pytest

from model.memory_profile import largest_batch


@pytest.mark.parametrize(("tokens", "sequences", "context"), [(10, 3, 4), (512, 128, 2048), (100, 256, 64), (7, 1, 50)])
def test_the_largest_batch_is_as_large_as_the_limits_allow(tokens, sequences, context):
    batch, num_blocks = largest_batch(tokens, sequences, context, 4)
    assert batch.num_tokens == min(tokens, sequences * context)
    assert len(batch.rows) == min(sequences, tokens)
    assert all(row.samples and len(row.token_ids) <= context for row in batch.rows)
    blocks = [block for row in batch.rows for block in row.block_ids]
    assert sorted(blocks) == list(range(num_blocks))
    assert all(len(row.block_ids) * 4 >= len(row.token_ids) for row in batch.rows)


@pytest.mark.parametrize("tokens", [10, 64])
def test_a_largest_batch_of_sources_counts_them(tokens):
    batch, num_blocks = largest_batch(tokens, 4, 20, 4, encodes=True)
    assert batch.num_tokens <= tokens
    assert batch.num_tokens > tokens - 4 or tokens > 4 * 20
    assert sorted(b for row in batch.rows for b in row.block_ids + row.cross_block_ids) == list(range(num_blocks))


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bart"])
def test_every_network_runs_its_largest_batch(name, make_runner):
    batch, _ = largest_batch(48, 6, 32, 4, encodes=name in ("t5", "bart"))
    outputs = make_runner(name).run(batch).rows
    assert all(output.error is None and output.token_id is not None for output in outputs)
