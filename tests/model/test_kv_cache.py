"""Sizes and copies of the paged cache."""

import torch

from model.kv_cache import KVCache, KVCacheShape

SHAPE = KVCacheShape(num_layers=3, block_size=4, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)


def test_a_budget_buys_what_fits_with_the_null_block():
    assert SHAPE.block_bytes == 2 * 3 * 4 * 2 * 8 * 2
    for blocks in (1, 7, 100):
        found = SHAPE.num_blocks_for(SHAPE.block_bytes * (blocks + 1) + 5)
        assert found == blocks
        cache = KVCache.of_shape(SHAPE, found, "cpu")
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in cache.keys + cache.values}
        assert sum(storage.nbytes() for storage in held.values()) <= SHAPE.block_bytes * (blocks + 1)
    assert SHAPE.num_blocks_for(5) == 0


def test_8_bits_take_a_byte_a_number_and_four_a_head():
    shape = KVCacheShape(num_layers=3, block_size=16, num_kv_heads=2, head_size=64, dtype=torch.int8)
    assert shape.block_bytes == 2 * 3 * 16 * 2 * (64 + 4)
    cache = KVCache.of_shape(shape, 5, "cpu")
    assert cache.pool.nbytes == 6 * shape.block_bytes


def test_copied_blocks_hold_the_same_in_every_layer_and_the_rest_is_untouched():
    cache = KVCache.of_shape(SHAPE, 6, "cpu")
    for tensor in cache.keys + cache.values:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in cache.keys + cache.values]
    cache.copy_blocks([(0, 3), (3, 5)])
    for tensor, old in zip(cache.keys + cache.values, before, strict=True):
        assert torch.equal(tensor[3], old[0])
        assert torch.equal(tensor[5], old[3])
        assert torch.equal(tensor[[0, 1, 2, 4]], old[[0, 1, 2, 4]])


def test_the_null_block_is_nobodys():
    cache = KVCache.of_shape(SHAPE, 6, "cpu")
    assert cache.null_block == cache.num_blocks == 6
    assert cache.keys[0].shape[0] == 7
