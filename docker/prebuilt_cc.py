#!/opt/slimpajama/bin/python
"""In place of a C compiler, where an image has none: Triton's host module, compiled while the image was built.

Triton compiles its `driver.c` when the first kernel is launched, by `$CC driver.c ... -o out.so ...`. In the builder,
`--build` does that in advance, against the driver's name alone, as the driver comes with the node. In the image, as CC,
this hands out the result for that very source, and refuses any other. Only the standard library.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PLACE = Path(sys.prefix) / "lib" / "triton-host"


def compiled(source: Path, place: Path) -> Path:
    """Where the module made from a source lies."""
    return place / f"{hashlib.sha256(source.read_bytes()).hexdigest()}.so"


def build(source: Path, includes: list[Path], place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "libcuda.so.1"
        empty = ["-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
        subprocess.run(["gcc", *empty], check=True)
        command = ["gcc", str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi", *(f"-I{path}" for path in includes)]
        command += ["-Wl,--no-as-needed", f"-L{folder}", "-l:libcuda.so.1", "-o", str(compiled(source, place))]
        subprocess.run(command, check=True)


def hand_out(arguments: list[str], place: Path) -> int:
    source = Path(next(argument for argument in arguments if argument.endswith(".c")))
    found = compiled(source, place)
    if not found.exists():
        sys.stderr.write(f"there is no compiler in this image, and {source.name} was not compiled with it\n")
        return 1
    shutil.copyfile(found, arguments[arguments.index("-o") + 1])
    return 0


def main() -> int:
    if sys.argv[1:] != ["--build"]:
        return hand_out(sys.argv[1:], PLACE)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        sys.stderr.write("there is no Triton to build for\n")
        return 1
    backend = Path(triton.origin).parent / "backends" / "nvidia"
    build(backend / "driver.c", [backend / "include", Path(sysconfig.get_config_var("INCLUDEPY"))], PLACE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
