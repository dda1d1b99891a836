"""`make bench-peers`: our service and its peers on one machine, interleaved, into tables, a plot and JSON.

For each shape and precision all servers are started and stopped by signal; then, cell by cell, each in turn goes on, is
measured and is stopped again, for as many rounds as asked. Results are appended to a file a line each, so that long
runs can be made in pieces; `--report` makes tables of what the file holds. A peer that does not install, start or
answer is listed with the reason.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.peers.cells import REQUESTS, Cell, embedding_cells, generation_cells, measured
from tests.peers.checkpoints import ENCODERS
from tests.peers.environments import Unavailable
from tests.peers.report import write_report
from tests.peers.servers import EMBEDDERS, GENERATORS, ROOT, Peer, Place, Running, free_port, start

THREADS = os.cpu_count() or 1


def main() -> int:
    options = _parser().parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for shape in options.shapes:
            for precision in options.precisions:
                _compare(shape, precision, options)
    return write_report(options.results, write=options.write)


def _parser() -> argparse.ArgumentParser:
    def listed(kind: type, *among: str) -> Any:
        def parse(text: str) -> tuple[Any, ...]:
            parts = tuple(kind(part) for part in text.split(","))
            if among and (unknown := [part for part in parts if part not in among]):
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(among)}")
            return parts

        return parse

    shapes, precisions = (*REQUESTS, *ENCODERS), ("fp32", "bf16", "int8", "int4")
    parser = argparse.ArgumentParser(prog="python -m tests.peers.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", type=listed(str), help="names, or their beginnings (default: all; we are always there)"
    )
    parser.add_argument("--shapes", type=listed(str, *shapes), default=shapes, help="of %(default)s")
    parser.add_argument("--precisions", type=listed(str, *precisions), default=precisions)
    parser.add_argument("--streams", type=listed(int), default=(1, 4, 16, 64))
    parser.add_argument("--clients", type=listed(int), default=(1, 8, 32), help="of embeddings")
    parser.add_argument("--prompts", type=listed(int), default=(128,), help="lengths in tokens")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a cell of embeddings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 1_000_000, help="of the prompts (default: the time)"
    )
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--cache", type=Path, default=ROOT / ".venv/peers", help="environments, checkpoints, builds")
    parser.add_argument("--results", type=Path, default=ROOT / "bench-results/peers.jsonl")
    parser.add_argument("--under", type=shlex.split, default=[], help='held while rounds are measured, as "flock FILE"')
    parser.add_argument("--report", action="store_true", help="measure nothing: tables of the results there are")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and docs/peers*")
    return parser


def _compare(shape: str, precision: str, options: argparse.Namespace) -> None:
    """One shape at one precision: all servers up, then round by round."""
    known, kind = (GENERATORS, "streams") if shape in REQUESTS else (EMBEDDERS, "clients")
    peers = [peer for peer in known if precision in peer.precisions and _is_wanted(peer, options.peers)]
    if not peers:
        return
    if kind == "streams":
        cells = generation_cells(
            shape, streams=options.streams, prompts=options.prompts, output_tokens=options.output_tokens
        )
    else:
        cells = embedding_cells(shape, clients=options.clients, seconds=options.seconds)
    servers = _start_all(peers, shape, precision, options)
    try:
        with _held(options.under):
            for number in range(options.rounds):
                order = servers[number % len(servers) :] + servers[: number % len(servers)]
                _round(order, cells, number, options)
    finally:
        for server in servers:
            server.end()


def _is_wanted(peer: Peer, names: tuple[str, ...] | None) -> bool:
    return names is None or peer is GENERATORS[0] or peer is EMBEDDERS[0] or peer.name.startswith(names)


def _start_all(peers: list[Peer], shape: str, precision: str, options: argparse.Namespace) -> list[Running]:
    servers: list[Running] = []
    for peer in peers:
        place = Place(
            shape=shape, precision=precision, port=free_port(), threads=options.threads, cache=options.cache,
            slots=max(options.streams if shape in REQUESTS else options.clients),
            context=max(options.prompts) + options.output_tokens + 64 if shape in REQUESTS else 512,
        )  # fmt: skip
        log = options.cache / f"{peer.name}-{shape}-{precision}.log".replace(" ", "-").replace(":", "")
        try:
            running = start(peer, place, log=log)
        except Unavailable as error:
            _keep(options, {"peer": peer.name, "shape": shape, "precision": precision, "unavailable": str(error)})
            continue
        _say(f"{shape} {precision}: {peer.name} is ready after {running.start_seconds:.1f} s")
        running.pause()
        servers.append(running)
    return servers


def _round(servers: list[Running], cells: list[Cell], number: int, options: argparse.Namespace) -> None:
    for index, cell in enumerate(cells):
        seed = options.seed + 100 * number + index
        for server in servers:
            if cell.streams > server.peer.max_streams:
                continue
            server.go_on()
            what = {"peer": server.peer.name, "shape": cell.shape, "precision": server.precision, "cell": cell.name}
            try:
                figures = measured(server, cell, seed=seed, cache=options.cache)
                _keep(options, what | {"round": number, "start_seconds": server.start_seconds, "figures": figures})
            except OSError as error:
                _keep(options, what | {"unavailable": f"{type(error).__name__}: {error}"})
            finally:
                server.pause()


@contextlib.contextmanager
def _held(command: list[str]) -> Iterator[None]:
    """Runs `command` with a shell that waits, for as long as the body takes: a lock that others know."""
    if not command:
        yield
        return
    holder = subprocess.Popen(
        [*command, "sh", "-c", "echo held; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    if holder.stdout.readline() != "held\n":
        raise SystemExit(f"{shlex.join(command)} does not run what it is given")
    try:
        yield
    finally:
        holder.stdin.close()
        holder.wait()


def _keep(options: argparse.Namespace, record: dict[str, Any]) -> None:
    with options.results.open("a") as file:
        file.write(json.dumps(record).replace("NaN", "null") + "\n")
    figures = record.get("figures", {})
    rate = figures.get("output_tokens_per_second") or figures.get("items_per_second")
    found = f"{rate:.1f} /s" if rate else record.get("unavailable") or f"failed: {figures.get('errors')}"
    _say(f"{record['shape']} {record['precision']} {record.get('cell', '')} {record['peer']}: {found}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
