"""The tensors of the paged key/value cache, and how many blocks a budget of memory buys.

Which block belongs to whom is the block manager's business; here are only storage, copies and arithmetic of sizes.
Runs in the worker process.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.transfer import on_device

SCALE_BYTES = 4
"""Behind a head's numbers where they are kept in 8 bits (`model/ops/narrow_strips.h`)."""


def room_of_head(head_size: int, dtype: torch.dtype) -> int:
    """How many numbers of the cache's dtype a head takes for each token."""
    return head_size + SCALE_BYTES if dtype == torch.int8 else head_size


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheShape:
    """What fixes the bytes of a block."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    """int8: symmetric, with a scale for each head of a token."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        num_values = room_of_head(self.head_size, self.dtype) * self.num_kv_heads * self.block_size
        return 2 * self.num_layers * num_values * self.dtype.itemsize

    def num_blocks_for(self, budget_bytes: int, *, bytes_beside: int = 0) -> int:
        """Blocks that fit in the budget with `bytes_beside` each, the null block apart."""
        return max(budget_bytes // (self.block_bytes + bytes_beside) - 1, 0)


class KVCache:
    """Keys and values of every layer, [num_blocks + 1, block_size, K, D] each (or what `room_of_head` makes of D); how
    numbers lie within a block is the attention backend's matter.

    The last block, `null_block`, is nobody's: padding rows of captured graphs write to it.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        *,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.null_block = num_blocks
        # One allocation, so that a copy of blocks is one indexed copy over all layers. Zeros and not `empty`: a masked
        # slot still takes part in a product with weight zero, where an old NaN would come through.
        block = (block_size, num_kv_heads, room_of_head(head_size, dtype))
        self.pool = torch.zeros((num_layers, 2, num_blocks + 1, *block), dtype=dtype, device=device)
        self.keys: list[Tensor] = [self.pool[layer, 0] for layer in range(num_layers)]
        self.values: list[Tensor] = [self.pool[layer, 1] for layer in range(num_layers)]

    @classmethod
    def of_shape(cls, shape: KVCacheShape, num_blocks: int, device: torch.device | str) -> "KVCache":
        return cls(
            shape.num_layers,
            num_blocks,
            block_size=shape.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=shape.dtype,
            device=device,
        )

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies block `source` to block `target` in all layers; sources are read before any target is written."""
        if not pairs:
            return
        sources, targets = on_device(np.array(pairs, np.int64), self.device).unbind(1)
        self.pool.index_copy_(2, targets, self.pool.index_select(2, sources))


def free_device_bytes(device: torch.device, fraction: float) -> int:
    """The share of a CUDA device's memory that may still be given to a cache.

    `fraction` is of the whole device: what weights, other checkpoints and other processes hold is taken off it.
    """
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(int(total * fraction) - (total - free - reusable), 0)
