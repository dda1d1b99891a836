"""Arrays to the device and results back, without the host waiting for the device in between.

To a GPU all arrays of a call go in one pinned, queued copy; results are copied behind the work that makes them and
waited for only where they are read. On a CPU nothing is copied at all. Runs in the worker process.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes: where a view of another type may begin, and what kernels' wide loads expect."""


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor there."""
    return upload([array], device)[0]


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors there; on a CPU they share the arrays' memory, on a GPU one allocation."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed, offsets = pack(arrays)
    there = torch.from_numpy(packed).pin_memory().to(device, non_blocking=True)
    return [view(there, offset, array) for offset, array in zip(offsets, arrays, strict=True)]


def pack(arrays: Sequence[NDArray[np.generic]]) -> tuple[NDArray[np.uint8], list[int]]:
    """All arrays' bytes in one, and where each begins.

    Worked example: 3 int64 and 5 int32 numbers take 24 and 20 bytes and begin at 0 and 32 of 52.
    """
    offsets = []
    end = 0
    for array in arrays:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + array.nbytes
    packed = np.zeros(max(end, 1), np.uint8)
    for offset, array in zip(offsets, arrays, strict=True):
        packed[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed, offsets


def view(packed: Tensor, offset: int, like: NDArray[np.generic]) -> Tensor:
    """The part of `packed` that holds an array of the shape and type of `like`."""
    dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
    return packed[offset : offset + like.nbytes].view(dtype).view(like.shape)


class HostNumbers:
    """int64 numbers that go to a device again and again, each time anew."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._tensor = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def writable(self) -> NDArray[np.int64]:
        """The numbers, once they have been copied for the last time that they were sent."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.numpy()

    def send(self, target: Tensor) -> None:
        """Queues the copy."""
        target.copy_(self._tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(target.device))


class HostCopy:
    """Tensors on their way to the host. Made where the work is queued, so that only this work is waited for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensors or tensors[0].device.type == "cpu":
            self._tensors = list(tensors)
            return
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
