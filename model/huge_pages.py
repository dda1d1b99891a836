"""CPU memory in huge pages (2 MiB), for what is read from end to end in every step.

In pages of 4 KiB the processor looks an address up for each of them, and its prefetching ends with them; in a virtual
machine that costs up to half of the rate at which it reads. Linux gives huge pages where it is asked to and can; memory
elsewhere is ordinary. Where memory is in pieces Linux makes room first, which takes milliseconds a page: not for what
is written to for the first time while requests are served, as the KV cache is. Knows nothing of what it holds. Runs in
the worker process.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21
LINE = 64
PIECE = 16 * PAGE
"""What a shelf grows by."""


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, whose memory is taken as it is written to."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < PAGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    return _memory(num_bytes)[:num_bytes].view(dtype).view(tuple(shape))


class Shelf:
    """Room for tensors side by side: of so many bytes, and piece by piece what they take beyond that."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self._free = zeros([sum(map(_padded, sizes))], torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor, on the shelf."""
        return self.room(tensor.shape, tensor.dtype).copy_(tensor)

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that is still to be filled."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._free):
            self._free = zeros([max(PIECE, _padded(size))], torch.uint8)
        taken, self._free = self._free[:size], self._free[_padded(size) :]
        return taken.view(dtype).view(tuple(shape))


def _padded(size: int) -> int:
    return -(-size // LINE) * LINE


def _memory(num_bytes: int) -> Tensor:
    """Bytes from the beginning of a huge page on; they are given back with the last tensor that is made of them."""
    area = mmap.mmap(-1, num_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :]
