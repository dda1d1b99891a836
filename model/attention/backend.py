"""Which attention backend serves a device. Runs in the worker process."""

import torch

from model.attention.cpu import CpuAttention
from model.attention.cuda import CudaAttention
from model.attention.interface import AttentionBackend
from model.attention.reference import ReferenceAttention


def backend_for(device: torch.device, *, deterministic: bool = False) -> AttentionBackend:
    """The fastest backend of the device's kind; the reference where there is none of its own."""
    if device.type == "cpu":
        return CpuAttention(deterministic=deterministic)
    if device.type == "cuda":
        return CudaAttention(deterministic=deterministic)
    return ReferenceAttention()
