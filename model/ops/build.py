"""Compiles the CPU operators: `python -m model.ops.build`, part of `make install` and of the image's builder.

Every source by itself, as many at a time as there are cores, against the headers of the installed torch, then one
library of all; without a compiler the service runs on torch's own operators. Not imported by the service.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from model.ops.files import LIBRARY, SOURCES, outdated_libraries


def build() -> Path | None:
    """Compiles if there is no library of these sources yet; returns the library, or None where there is no compiler.

    Raises: subprocess.CalledProcessError if the compiler refuses.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    if LIBRARY.exists():
        return LIBRARY
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]
    compile_one = [compiler, "-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
    # Products and sums are fused where the sources say so: alike on all processors, and in every block of rows.
    compile_one += ["-ffp-contract=off", *threads]
    compile_one += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    compile_one += [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    link = [compiler, "-shared", *threads]
    link += [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    partial = LIBRARY.with_suffix(f".{os.getpid()}.partial")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {source: str(Path(folder, source.stem).with_suffix(".o")) for source in SOURCES}
        jobs = [pool.submit(_run, [*compile_one, "-c", str(source), "-o", out]) for source, out in objects.items()]
        for job in jobs:
            job.result()
        _run([*link, *objects.values(), "-ltorch_cpu", "-lc10", "-o", str(partial)])
    partial.replace(LIBRARY)
    for path in outdated_libraries():
        path.unlink()
    return LIBRARY


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    found = build()
    sys.stdout.write(f"operators: {found.name if found else 'no C++ compiler, torch is used alone'}\n")
