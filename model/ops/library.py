"""Loads the compiled CPU operators, if they were built: afterwards they are `torch.ops.slimpajama.*`.

Knows where the library is and whether it loaded, nothing of what the operators compute. Worker process.
"""

import logging

import torch
from torch import Tensor

from model.ops.files import LIBRARY, outdated_libraries

log = logging.getLogger("slimpajama.worker")


def _load() -> bool:
    if not LIBRARY.exists():
        if outdated_libraries():
            log.warning("the compiled operators are of other sources; run `make install`")
        return False
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:  # built against another torch
        log.warning("the compiled operators cannot be loaded", extra={"reason": str(error)})
        return False
    if not torch.ops.slimpajama.has_lanes():
        log.warning("this processor is too old for the compiled operators: AVX2 and FMA are wanted")
        return False
    return True


LOADED = _load()


def serves(tensor: Tensor) -> bool:
    """Whether the operators take this tensor: bfloat16 on a CPU."""
    return LOADED and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def sums(tensor: Tensor) -> bool:
    """Whether the operators add up these rows."""
    return LOADED and tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float32)


def torch_has_bfloat16() -> bool:
    """Whether torch's own CPU kernels multiply bfloat16 in hardware here."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attends(block_size: int, head_size: int) -> bool:
    """Whether the operators attend fast where blocks and heads have these sizes: for others than `paged_layout.h` cuts
    into lines they have a plain loop."""
    return LOADED and block_size % 16 == 0 and head_size % 32 == 0 and head_size <= 256
