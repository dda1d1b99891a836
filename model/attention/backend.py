"""Which attention backend serves a device. Runs in the worker process."""

import torch

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend
from model.attention.reference import ReferenceAttention


def backend_for(device: torch.device, *, deterministic: bool = False) -> AttentionBackend:
    """The fastest backend of the device's kind; the reference where there is none of its own.

    `deterministic`: bitwise the same in any batch, which only the CPU's can be.
    """
    if device.type == "cpu":
        return CpuAttention(deterministic=deterministic)
    if device.type == "cuda":
        # Not above: its kernels' compilers take two seconds to import, which a worker on CPUs can do without.
        from model.attention.cuda import CudaAttention

        return CudaAttention()
    return ReferenceAttention()
