"""The other ranks of a worker whose decoders are divided over several devices: started, told what to compute, watched.

Rank 0 is the worker that the API process talks to; scheduler, sampling and sockets are its alone. The others are
processes of its own (`service.engine.rank`): they hold their part of the weights and of the cache, and run every
forward pass that they are told of, in the same order. If one ends, so does the worker, and the supervisor starts all
anew and replays. Runs in rank 0's worker process; passes may come from its main thread and from its loader.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec
import torch
import torch.distributed as dist

from model.batch import Batch, Row, SamplingParams
from model.errors import CheckpointError
from model.temporary_folder import TemporaryFolder
from service.engine.protocol import HEADER_BYTES, ModelSpec, WorkerConfig

log = logging.getLogger("slimpajama.worker")

EXIT_RANK_LOST = 71
"""The worker's exit status when another rank has ended."""


class Hold(msgspec.Struct, tag="hold"):
    """Read this rank's part of a checkpoint; answered by `Held`."""

    spec: ModelSpec
    dtype: str


class Cache(msgspec.Struct, tag="cache"):
    """Make a KV cache of so many blocks for it, in place of the one that it has."""

    model: str
    num_blocks: int
    dtype: str


class ForwardRow(msgspec.Struct, array_like=True):
    sequence_id: int
    token_ids: list[int]
    start: int
    block_ids: list[int]


class Forward(msgspec.Struct, tag="forward"):
    """Compute a step's keys and values."""

    model: str
    rows: list[ForwardRow]
    block_copies: list[tuple[int, int]]

    def batch(self) -> Batch:
        """Nothing is sampled of it: that is rank 0's."""
        nothing = SamplingParams(max_tokens=0)
        rows = [
            Row(row.sequence_id, row.token_ids, row.start, row.block_ids, nothing, False, [], []) for row in self.rows
        ]
        return Batch(rows, self.block_copies)


class Drop(msgspec.Struct, tag="drop"):
    """Free a checkpoint."""

    model: str


class Held(msgspec.Struct, tag="held"):
    error: str | None = None


ToRank = WorkerConfig | Hold | Cache | Forward | Drop

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[Held] = msgspec.msgpack.Decoder(Held)


def send(endpoint: socket.socket, message: ToRank | Held) -> None:
    body = _encoder.encode(message)
    endpoint.sendall(len(body).to_bytes(HEADER_BYTES, "little") + body)


def receive_order(endpoint: socket.socket) -> ToRank:
    return _to_rank.decode(_receive(endpoint))


def receive_answer(endpoint: socket.socket) -> Held:
    return _from_rank.decode(_receive(endpoint))


def _receive(endpoint: socket.socket) -> bytes:
    """A whole frame. Raises ConnectionResetError if the other side has ended."""
    size = int.from_bytes(_exactly(endpoint, HEADER_BYTES), "little")
    return _exactly(endpoint, size)


def _exactly(endpoint: socket.socket, size: int) -> bytes:
    body = bytearray()
    while len(body) < size:
        chunk = endpoint.recv(size - len(body))
        if not chunk:
            raise ConnectionResetError("the other rank has ended")
        body += chunk
    return bytes(body)


def meet(device: torch.device, rank: int, size: int, meeting: str) -> None:
    """Joins the process group, which has the same members as long as they live."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are on one machine
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size)


def num_threads(config: WorkerConfig) -> int:
    """Of each rank on CPUs: they share the cores."""
    return config.num_threads or max(1, (os.cpu_count() or 1) // config.num_ranks)


def device_of(name: str, rank: int) -> torch.device:
    """Raises ValueError for one device where there is to be one for each rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:"):
        raise ValueError(f"device {name} is one; with tensor_parallel_size above 1 say cuda, and rank r takes cuda:r")
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


class Ranks:
    """The ranks from 1 on. Made by the main thread: their processes end when the thread that started them does.

    `lock` keeps the order of the passes the same everywhere: whoever runs one holds it."""

    def __init__(self, config: WorkerConfig) -> None:
        self.size = config.num_ranks
        self.device = device_of(config.device, 0)
        self.lock = threading.Lock()
        self._folder = TemporaryFolder("ranks")
        self._meeting = str(self._folder.path / "meeting")
        self._has_met = False
        self._loading = threading.Lock()
        self._endpoints: list[socket.socket] = []
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "service.engine.rank", "--socket", str(theirs.fileno())]
            command += ["--rank", str(rank), "--meeting", self._meeting, "--parent", str(os.getpid())]
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
            theirs.close()
            self._endpoints.append(ours)
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()
            send(ours, config)

    def _meet(self) -> None:
        """Waits, once, until all ranks are there."""
        if not self._has_met:
            meet(self.device, 0, self.size, self._meeting)
            self._has_met = True

    @contextlib.contextmanager
    def hold(self, spec: ModelSpec, dtype: str) -> Iterator[None]:
        """Has the others read their parts while we read ours, and waits for them; one checkpoint at a time.

        Raises CheckpointError, in its words, if a rank could not.
        """
        with self._loading:
            self._meet()
            with self.lock:
                self._tell(Hold(spec, dtype))
            try:
                yield
            finally:
                answers = [receive_answer(endpoint) for endpoint in self._endpoints]
        for answer in answers:
            if answer.error is not None:
                raise CheckpointError(answer.error)

    def make_cache(self, model: str, num_blocks: int, dtype: str) -> None:
        """Called with the lock held."""
        self._tell(Cache(model, num_blocks, dtype))

    def forward(self, model: str, batch: Batch) -> None:
        """Called with the lock held, which is kept until our own part of the pass is launched."""
        rows = [ForwardRow(row.sequence_id, row.token_ids, row.start, row.block_ids) for row in batch.rows]
        self._tell(Forward(model, rows, batch.block_copies))

    def drop(self, model: str) -> None:
        with self.lock:
            self._tell(Drop(model))

    def _tell(self, message: ToRank) -> None:
        for endpoint in self._endpoints:
            send(endpoint, message)

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        """Ends the worker with the rank: our main thread may be inside a sum that will never be complete."""
        code = process.wait()
        log.error("a rank has ended", extra={"rank": rank, "exit_status": code})
        self._folder.remove()
        os._exit(EXIT_RANK_LOST)
