"""What kernels are launched with from Hopper on: an early start (CUDA's programmatic dependent launch), registers.

A kernel launched with what `early_start` gives may run beside its predecessor on the stream; what it does before
`wait_for_previous` must not hang on that one, and must write nothing. Every kernel of such a chain waits, so that
whatever ran earlier is done, too. From Hopper on; recorded in CUDA graphs like any launch. Importing this needs Triton.
"""

import functools
from typing import Any

import torch
from triton.language.extra import cuda as triton_cuda

let_next_start: Any = getattr(triton_cuda, "gdc_launch_dependents", None)
"""In a kernel: from here on the next one may begin, as soon as all programs of this one are that far."""
wait_for_previous: Any = getattr(triton_cuda, "gdc_wait", None)
"""In a kernel: waits until the one before has ended and what it wrote can be read."""


def early_start(device: torch.device) -> dict[str, Any]:
    """What a launch on the device takes along for it; nothing where there is no such thing."""
    return {"launch_pdl": True} if device.type == "cuda" and _starts_early(device.index or 0) else {}


def registers(device: torch.device, count: int) -> dict[str, Any]:
    """What a launch on a Hopper takes along so that a thread has so many at most; other devices choose themselves.

    Without a word Hopper's compiler may fall back to 32 of them, and the rest lies in memory.
    """
    return {"maxnreg": count} if is_hopper(device) else {}


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and _capability(device.index or 0)[0] == 9


def _starts_early(index: int) -> bool:
    known = let_next_start is not None and wait_for_previous is not None
    return known and torch.version.hip is None and _capability(index) >= (9, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
