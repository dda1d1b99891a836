"""The choice of a backend by the device."""

import pytest
import torch

from model.attention.backend import backend_for
from model.attention.cpu import CpuAttention
from model.attention.cuda import CudaAttention
from model.attention.reference import ReferenceAttention


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", CpuAttention), ("cuda:1", CudaAttention), ("mps", ReferenceAttention)]
)
def test_every_device_has_a_backend(device, backend):
    assert isinstance(backend_for(torch.device(device)), backend)
