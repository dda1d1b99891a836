"""Arrays on their way: what is packed for one copy comes out as it went in."""

import numpy as np
import torch

from model.transfer import ALIGNMENT, HostCopy, pack, upload, view

ARRAYS = [
    np.arange(3, dtype=np.int64),
    np.arange(10, dtype=np.int32).reshape(5, 2),
    np.zeros(0, np.int64),
    np.array([True, False, True]),
    np.linspace(0, 1, 7),
    np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
]


def test_packed_arrays_are_read_back_from_their_places():
    packed, offsets = pack(ARRAYS)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    for offset, array in zip(offsets, ARRAYS, strict=True):
        found = view(torch.from_numpy(packed), offset, array)
        assert found.shape == array.shape
        assert np.array_equal(found.numpy(), array)
        assert found.numpy().dtype == array.dtype


def test_nothing_at_all_can_be_packed():
    packed, offsets = pack([np.zeros(0, np.int64)])
    assert view(torch.from_numpy(packed), offsets[0], np.zeros(0, np.int64)).shape == (0,)


def test_on_a_cpu_nothing_is_copied():
    (found,) = upload([ARRAYS[0]], torch.device("cpu"))
    assert found.data_ptr() == ARRAYS[0].ctypes.data
    assert HostCopy([found]).wait()[0] is found
