"""Keeps glibc from holding on to memory that nobody uses: the heaps of many threads, and holes between what lives on.

Runs in both processes, on Linux with glibc; elsewhere it does nothing. Does not know torch.
"""

import contextlib
import ctypes
import gc
import sys

MAX_HEAPS = 2
"""By default there are eight for each core, and what one thread has freed another cannot have."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def bound_heaps(*, large_bytes: int | None = None) -> None:
    """To be called before there are threads. Blocks from `large_bytes` on go back to the machine as soon as they are
    free, always: by default that bound rises with use, and a step's tensors are faster for it."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            glibc = ctypes.CDLL(None)
            glibc.mallopt(_M_ARENA_MAX, MAX_HEAPS)
            if large_bytes is not None:
                glibc.mallopt(_M_MMAP_THRESHOLD, large_bytes)
                glibc.mallopt(_M_TRIM_THRESHOLD, 8 * large_bytes)


def keep_what_is_here() -> None:
    """To be called once all is imported: collections look at what comes later alone. A hundred thousand objects of
    modules cost every full one 30 ms, in which nothing else ran."""
    gc.collect()
    gc.freeze()


def free_memory() -> None:
    """After something large has gone: cycles first (a chat template is one), then every page that is free."""
    gc.collect()
    free_pages()


def free_pages() -> None:
    """Every page that is free, now: glibc does not put an aligned block where one of its size has been, so that many
    large ones, one after the other, leave as many holes."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
