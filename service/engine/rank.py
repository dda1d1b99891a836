"""The process of one rank from 1 on: its part of the weights and of the caches, and the passes that rank 0 tells of.

Does in turn what it is told, and ends when it cannot, or when rank 0 is gone. Knows no requests, scheduling or
sampling. `python -m service.engine.rank`, started by rank 0's worker.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import threading

import torch

from model.attention.backend import backend_for
from model.attention.interface import AttentionBackend
from model.decoder import Decoder
from model.errors import CheckpointError
from model.kv_cache import KVCache
from model.runner import Runner
from service import logs
from service.engine import ranks
from service.engine.generating_network import cache_shape, load_generating
from service.engine.protocol import WorkerConfig
from service.engine.ranks import Cache, Drop, Forward, Held, Hold
from service.engine.worker import die_with_parent

log = logging.getLogger("slimpajama.worker")


class RankProcess:
    def __init__(self, endpoint: socket.socket, config: WorkerConfig, rank: int) -> None:
        self._endpoint = endpoint
        self._config = config
        self._rank = rank
        self._device = ranks.device_of(config.device, rank)
        self._backend: AttentionBackend = backend_for(self._device, deterministic=config.deterministic)
        self._networks: dict[str, Decoder] = {}
        self._runners: dict[str, Runner] = {}

    def run(self) -> None:
        while True:
            message = ranks.receive_order(self._endpoint)
            match message:
                case Hold():
                    # Beside the passes of other checkpoints, which rank 0 goes on with.
                    threading.Thread(target=self._hold, args=(message,), name="loader", daemon=True).start()
                case Cache():
                    self._make_cache(message)
                case Forward():
                    self._runners[message.model].launch(message.batch())
                case Drop():
                    self._runners.pop(message.model, None)
                    self._networks.pop(message.model, None)
                    torch.cuda.empty_cache()
                case WorkerConfig():
                    raise AssertionError("the configuration is the first message")

    def _hold(self, message: Hold) -> None:
        """Answers with what is wrong with our part of the checkpoint, if anything; a fault of our own ends the rank."""
        spec, dtype = message.spec, getattr(torch, message.dtype)
        try:
            network = load_generating(spec, self._device, dtype, rank=self._rank, num_ranks=self._config.num_ranks)
        except CheckpointError as error:
            ranks.send(self._endpoint, Held(str(error)))
            return
        except Exception:
            log.exception("loading failed", extra={"model": spec.key, "rank": self._rank})
            os._exit(1)
        assert isinstance(network, Decoder)
        self._networks[spec.key] = network
        ranks.send(self._endpoint, Held())

    def _make_cache(self, message: Cache) -> None:
        network = self._networks[message.model]
        self._runners.pop(message.model, None)
        shape = cache_shape(network.config, self._config.block_size, getattr(torch, message.dtype))
        cache = KVCache.of_shape(shape, message.num_blocks, self._device)
        self._runners[message.model] = Runner(network, network.config, cache, self._backend)


def main() -> None:
    parser = argparse.ArgumentParser(prog="slimpajama-rank", description="Started by rank 0's worker.")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--meeting", required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains first, and we end with it
    endpoint = socket.socket(fileno=arguments.socket)
    config = ranks.receive_order(endpoint)
    assert isinstance(config, WorkerConfig)
    logs.configure(config.log_format, config.log_level)
    torch.set_num_threads(ranks.num_threads(config))
    process = RankProcess(endpoint, config, arguments.rank)
    ranks.meet(process._device, arguments.rank, config.num_ranks, arguments.meeting)
    with contextlib.suppress(ConnectionResetError):
        process.run()


if __name__ == "__main__":
    main()
