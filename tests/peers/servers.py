"""The servers that are compared: for each, how it is started on a checkpoint at a precision, and how it wants its work.

A server is a process group of its own, stopped by signal while another one is measured, so that none disturbs. Start
commands are data; knows nothing of loads or tables.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.peers.checkpoints import checkpoint, converted
from tests.peers.environments import Unavailable, llama_server, python_of

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
OURS = "slimpajama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a start command is made from. `slots` streams of `context` tokens at most are sent."""

    shape: str
    precision: str
    port: int
    threads: int
    slots: int
    context: int
    cache: Path

    def converted(self, kind: str) -> str:
        return str(converted(self.shape, f"{kind}-{self.precision}", self.cache))

    @property
    def checkpoint(self) -> str:
        return str(checkpoint(self.shape, self.cache))

    def python(self, name: str) -> str:
        return str(python_of(name, self.cache))


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`fields` go over each request's body, `options` to our bench; `text` peers take no token ids; `max_streams`
    bounds what is slow."""

    name: str
    precisions: tuple[str, ...]
    command: Callable[[Place], list[str]]
    health: str = "/health"
    environment: Callable[[Place], dict[str, str]] = lambda place: {}
    fields: dict[str, object] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    text: bool = False
    max_streams: int = 64
    piped: bool = False


def _ours(place: Place) -> list[str]:
    """With a bound on steps that outlasts being stopped: a worker that has not moved for a minute counts as stuck."""
    types = {
        "fp32": ["--dtype", "float32"],
        "bf16": ["--dtype", "bfloat16"],
        "int8": ["--quantization", "int8"],
        "int4": ["--quantization", "int4"],
    }
    command = [sys.executable, "-m", "service", "serve", "--model", place.checkpoint, "--port", str(place.port)]
    return [
        *command,
        "--worker-threads",
        str(place.threads),
        "--log-level",
        "warning",
        "--step-timeout",
        "86400",
        *types[place.precision],
    ]


def _llama(place: Place, *more: str) -> list[str]:
    sizes = ["--parallel", str(place.slots), "--ctx-size", str(place.slots * place.context)]
    threads = ["--threads", str(place.threads), "--threads-batch", str(place.threads)]
    command = [str(llama_server(place.cache)), "--model", place.converted("gguf"), "--port", str(place.port)]
    # On processors with AMX its own repacking of 8-bit weights ends in a segmentation fault (llama-cpp-python 0.3.36).
    has_amx = place.precision == "int8" and "amx_int8" in Path("/proc/cpuinfo").read_text()
    return [*command, *sizes, *threads, *more, *(["--no-repack"] if has_amx else [])]


def _vllm(place: Place, *more: str) -> list[str]:
    folder = place.converted("w8a8") if place.precision == "int8" else place.checkpoint
    types = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}
    sizes = ["--max-num-seqs", str(max(place.slots, 64))]
    command = [
        place.python("vllm"),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder,
        "--port",
        str(place.port),
    ]
    return [*command, "--dtype", types[place.precision], *sizes, *more]


def _vllm_environment(place: Place) -> dict[str, str]:
    """As its documentation advises for CPUs: its own OpenMP first, threads bound, no usage reports."""
    cores = f"0-{place.threads - 1}"
    libraries = Path(place.python("vllm")).parents[1] / "lib"
    preloaded = [str(path) for name in ("libtcmalloc_minimal.so.4", "libiomp5.so") for path in libraries.glob(name)]
    return {
        "LD_PRELOAD": ":".join(preloaded),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _transformers(place: Place) -> list[str]:
    options = [
        "--continuous-batching",
        "--cb-num-blocks",
        "1024",
        "--cb-max-batch-tokens",
        "512",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--port",
        str(place.port),
    ]
    script = str(Path(place.python("transformers")).parent / "transformers")
    return [place.python("transformers"), script, "serve", place.checkpoint, *options]


def _openvino(place: Place) -> list[str]:
    script = [str(HERE / "openvino_server.py"), place.converted("openvino"), str(place.port), str(place.threads)]
    return [place.python("openvino"), *script]


def _infinity(place: Place) -> list[str]:
    options = [
        "--engine",
        "torch",
        "--device",
        "cpu",
        "--dtype",
        {"fp32": "float32", "bf16": "bfloat16"}[place.precision],
    ]
    script = str(Path(place.python("infinity")).parent / "infinity_emb")
    paths = ["--model-id", place.checkpoint, "--port", str(place.port), "--url-prefix", "/v1"]
    return [place.python("infinity"), script, "v2", *paths, *options, "--no-bettertransformer"]


def _in_process(backend: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        arguments = [place.checkpoint, backend, place.precision, str(place.threads)]
        return [place.python("encoders"), str(HERE / "in_process.py"), *arguments]

    return command


GENERATORS = (
    Peer(name=OURS, precisions=("bf16", "int8", "int4"), command=_ours, health="/readyz"),
    Peer(name="llama.cpp", precisions=("bf16", "int8", "int4"), command=_llama, fields={"cache_prompt": False}),
    Peer(
        name="vLLM",
        precisions=("bf16", "int8"),
        command=lambda place: _vllm(place, "--max-model-len", str(max(place.context, 512))),
        environment=_vllm_environment,
    ),
    Peer(name="OpenVINO GenAI", precisions=("bf16", "int8", "int4"), command=_openvino),
    Peer(
        name="transformers serve",
        precisions=("bf16",),
        command=_transformers,
        fields={
            "ignore_eos": None,
            "generation_config": '{"do_sample": false, "eos_token_id": null, "pad_token_id": 0}',
        },
        options=("--ends-by-reason",),
        text=True,
        max_streams=16,
    ),
)
EMBEDDERS = (
    Peer(name=OURS, precisions=("fp32", "bf16", "int8"), command=_ours, health="/readyz"),
    Peer(
        name="llama.cpp",
        precisions=("fp32", "bf16", "int8"),
        command=lambda place: _llama(place, "--embedding", "--pooling", "mean"),
    ),
    Peer(
        name="vLLM",
        precisions=("fp32", "bf16"),
        command=lambda place: _vllm(place, "--runner", "pooling"),
        environment=_vllm_environment,
    ),
    Peer(name="infinity", precisions=("fp32", "bf16"), command=_infinity, health="/health"),
    Peer(name="in process: torch", precisions=("fp32", "bf16"), command=_in_process("torch"), piped=True),
    Peer(name="in process: ONNX", precisions=("fp32", "int8"), command=_in_process("onnx"), piped=True),
    Peer(name="in process: OpenVINO", precisions=("fp32", "bf16", "int8"), command=_in_process("openvino"), piped=True),
)


@dataclass(slots=True)
class Running:
    """A started server. `group` is its process group; a piped one is spoken to by its standard input and output."""

    peer: Peer
    precision: str
    url: str
    process: "subprocess.Popen[str]"
    start_seconds: float
    model: str | None = None

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Ends the whole group, what the server has started included."""
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(peer: Peer, place: Place, *, log: Path, patience_seconds: float = 900.0) -> Running:
    """A ready server. Raises `Unavailable` with what it said last if it does not come up."""
    threads = {name: str(place.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, **peer.environment(place)}
    command = peer.command(place)
    began = time.perf_counter()
    pipe = subprocess.PIPE if peer.piped else None
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=pipe or subprocess.DEVNULL, stdout=pipe or output, stderr=output, text=True, env=environment,
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    running = Running(peer, place.precision, f"http://127.0.0.1:{place.port}", process, 0.0)
    while not _is_ready(running):
        if process.poll() is not None or time.perf_counter() - began > patience_seconds:
            running.end()
            raise Unavailable(f"does not start: {_last_error(log)}")
        time.sleep(0.1)
    running.start_seconds = time.perf_counter() - began
    return running


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line] or lines
    return "".join(told[-1:])[-250:]


def _is_ready(running: Running) -> bool:
    if running.peer.piped:
        assert running.process.stdout is not None
        return "ready" in running.process.stdout.readline()
    try:
        with urllib.request.urlopen(running.url + running.peer.health, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
