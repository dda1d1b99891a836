"""The CUDA image's stand-in for a compiler hands out what was built in advance for its source, and for no other."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "prebuilt_cc.py"
SOURCE = """
#include <Python.h>
extern int cuInit(unsigned int flags);
static PyObject *start(PyObject *self, PyObject *arguments) { return PyLong_FromLong(cuInit(0)); }
static PyMethodDef methods[] = {{"start", start, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "cuda_utils", NULL, -1, methods};
PyMODINIT_FUNC PyInit_cuda_utils(void) { return PyModule_Create(&module); }
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prebuilt_cc", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def built(script: ModuleType, tmp_path: Path) -> Path:
    """The folder of what was built in advance from SOURCE."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    (tmp_path / "driver.c").write_text(SOURCE)
    place = tmp_path / "place"
    script.build(tmp_path / "driver.c", [Path(sysconfig.get_config_var("INCLUDEPY"))], place)
    return place


def command(source: Path, out: Path) -> list[str]:
    """As Triton calls its compiler."""
    return [str(source), "-O3", "-shared", "-fPIC", "-o", str(out), "-l:libcuda.so.1", "-L/driver", "-I/include"]


def test_the_same_source_gets_what_was_built_in_advance(script: ModuleType, built: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "cuda_utils.c"
    again.parent.mkdir()
    again.write_text(SOURCE)
    assert script.hand_out(command(again, tmp_path / "out.so"), built) == 0
    assert (tmp_path / "out.so").read_bytes() == next(built.iterdir()).read_bytes()


def test_what_was_built_asks_for_the_nodes_driver(built: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    listed = subprocess.run(["readelf", "--dynamic", str(next(built.iterdir()))], capture_output=True, text=True)
    assert re.search(r"NEEDED.*\[libcuda\.so\.1\]", listed.stdout)


def test_another_source_is_refused(
    script: ModuleType, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.c").write_text(SOURCE + "int more;")
    assert script.hand_out(command(tmp_path / "other.c", tmp_path / "out.so"), built) == 1
    assert "no compiler in this image" in capsys.readouterr().err
    assert not (tmp_path / "out.so").exists()
