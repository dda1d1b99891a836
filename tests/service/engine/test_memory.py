"""glibc keeps no heap for each thread, and the collector does not look at modules over and over."""

import subprocess
import sys

import pytest

HEAPS = """
import ctypes, threading
from service.engine.memory import bound_heaps
if {bounded}:
    bound_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
everybody = threading.Barrier(8)
def work():
    libc.malloc(1000)
    everybody.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(stream := libc.fdopen(1, b"w")))
libc.fflush(ctypes.c_void_p(stream))
"""


def _num_heaps(*, bounded: bool) -> int:
    command = [sys.executable, "-c", HEAPS.format(bounded=bounded)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("<heap nr=")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps a heap for each thread")
def test_threads_share_two_heaps() -> None:
    if _num_heaps(bounded=False) <= 2:
        pytest.skip("this C library, or this machine, makes no heaps for threads")
    assert _num_heaps(bounded=True) == 2


def test_what_was_imported_is_left_out_of_collections() -> None:
    code = "import gc; from service.engine import memory; memory.keep_what_is_here(); print(len(gc.get_objects()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100
