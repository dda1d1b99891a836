"""Loads the compiled CPU operators, if they were built: afterwards they are `torch.ops.slimpajama.*`.

Knows where the library is and whether it loaded, nothing of what the operators compute. Worker process.
"""

import logging

import torch
from torch import Tensor

from model.ops.files import LIBRARY, is_current

log = logging.getLogger("slimpajama.worker")


def _load() -> bool:
    if not LIBRARY.exists():
        return False
    if not is_current():
        log.warning("the compiled operators are older than their source; run `make install`")
        return False
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:  # built against another torch
        log.warning("the compiled operators cannot be loaded", extra={"reason": str(error)})
        return False
    return True


LOADED = _load()


def serves(tensor: Tensor) -> bool:
    """Whether the operators take this tensor: bfloat16 on a CPU."""
    return LOADED and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
