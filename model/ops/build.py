"""Compiles the CPU operators: `python -m model.ops.build`, part of `make install` and of the image's builder.

One call of the C++ compiler against the headers of the installed torch; without a compiler the service runs on torch's
own operators. Not imported by the service.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from model.ops.files import LIBRARY, SOURCE


def build() -> Path | None:
    """Compiles if the source is newer than the library; returns the library, or None where there is no compiler.

    Raises: subprocess.CalledProcessError if the compiler refuses.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    if LIBRARY.exists() and LIBRARY.stat().st_mtime >= SOURCE.stat().st_mtime:
        return LIBRARY
    partial = LIBRARY.with_suffix(f".{os.getpid()}.partial")
    command = [compiler, "-O3", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(SOURCE), "-o", str(partial)]
    command += [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    command += [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command += ["-ltorch_cpu", "-lc10"] + ([] if sys.platform == "darwin" else ["-fopenmp"])
    subprocess.run(command, check=True)
    partial.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    found = build()
    sys.stdout.write(f"operators: {found.name if found else 'no C++ compiler, torch is used alone'}\n")
