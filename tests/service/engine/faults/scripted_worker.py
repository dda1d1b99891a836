"""A worker without a network, so that it starts at once: a checkpoint's folder says what it does.

`token`: the one id that it generates. `refuse`: it does not load. `die`: loading it ends the process. `slow`: it loads
when that file is taken away. Every request gets one token a step, up to its `max_tokens`; what was delivered before
counts. Messages about what happened go to `journal` in the folder.
"""

import argparse
import os
import socket
import struct
import time
from pathlib import Path

from service.engine.connection import ConnectionLostError, WorkerConnection
from service.engine.progress import ProgressClock
from service.engine.protocol import (
    Cancel,
    Encode,
    EncodeResult,
    Generate,
    Load,
    Loaded,
    LoadFailed,
    ModelSpec,
    Step,
    TokenOutput,
    ToWorker,
    Unload,
    Unloaded,
    WorkerConfig,
)

STEP_SECONDS = 0.002


class ScriptedWorker:
    def __init__(self, connection: WorkerConnection, clock: ProgressClock) -> None:
        self._connection = connection
        self._clock = clock
        self._loading: list[ModelSpec] = []
        self._folders: dict[str, Path] = {}
        self._requests: dict[int, tuple[Generate, int]] = {}

    def run(self) -> None:
        while True:
            self._clock.beat(time.monotonic())
            for message in self._connection.receive(STEP_SECONDS):
                self._handle(message)
            for spec in list(self._loading):
                self._load(spec)
            self._step()

    def _handle(self, message: ToWorker) -> None:
        match message:
            case WorkerConfig():
                self._loading += message.models
            case Load():
                self._loading.append(message.spec)
            case Unload():
                folder = self._folders.pop(message.model, None)
                if folder is not None:
                    journal(folder, "unloaded")
                self._connection.send(Unloaded(message.model))
            case Generate():
                if message.model in self._folders:
                    self._requests[message.request_id] = (message, len(message.output_ids))
                else:
                    output = TokenOutput(request_id=message.request_id, finish_reason="error", error="not loaded")
                    self._connection.send(Step(model=message.model, tokens=[output]))
            case Encode():
                token = float((self._folders[message.model] / "token").read_text())
                data = struct.pack("<4f", *[token] * 4)
                results = [
                    EncodeResult(request_id=message.request_id, index=index, shape=[4], data=data)
                    for index in range(len(message.inputs))
                ]
                self._connection.send(Step(model=message.model, encoded=results))
            case Cancel():
                self._requests.pop(message.request_id, None)

    def _load(self, spec: ModelSpec) -> None:
        folder = Path(spec.folder)
        if (folder / "die").exists():
            journal(folder, "died")
            os._exit(5)
        if (folder / "slow").exists():
            return
        self._loading.remove(spec)
        if (folder / "refuse").exists():
            self._connection.send(LoadFailed(spec.key, "a tensor is missing"))
            return
        self._folders[spec.key] = folder
        journal(folder, "loaded")
        self._connection.send(Loaded(model=spec.key, dtype="float32", device="cpu", weight_bytes=1))

    def _step(self) -> None:
        outputs: dict[str, list[TokenOutput]] = {}
        for number, (message, done) in list(self._requests.items()):
            token = int((self._folders[message.model] / "token").read_text())
            finished = done + 1 >= message.sampling.max_tokens
            output = TokenOutput(request_id=number, token_ids=[token], finish_reason="length" if finished else None)
            outputs.setdefault(message.model, []).append(output)
            self._requests[number] = (message, done + 1)
            if finished:
                del self._requests[number]
        for model, tokens in outputs.items():
            self._connection.send(Step(model=model, started_ids=[entry.request_id for entry in tokens], tokens=tokens))


def journal(folder: Path, what: str) -> None:
    with (folder / "journal").open("a") as file:
        file.write(f"{what}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--socket", "--clock", "--parent"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--step-timeout", type=float)
    arguments = parser.parse_args()
    wake, _ = os.pipe()
    connection = WorkerConnection(socket.socket(fileno=arguments.socket), wake)
    try:
        ScriptedWorker(connection, ProgressClock(arguments.clock)).run()
    except ConnectionLostError:
        return


if __name__ == "__main__":
    main()
