"""`slimpajama COMMAND ...`: reads which command is meant and hands it the rest of the line.

Each command is a module with `main(arguments) -> exit code`, imported only when it is asked for: help and mistakes are
answered at once, and a tool's own dependencies stay its own.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

from service.flags import EXIT_USAGE, read_serve_flags
from service.settings_sources import unknown_name


class Command(NamedTuple):
    module: str
    text: str


COMMANDS = {
    "serve": Command("service.serve", "load checkpoints and serve them over HTTP"),
    "models": Command("service.list_models", "say what checkpoint folders hold and which tasks they can do"),
    "bench": Command("service.bench.command", "measure a running service: throughput, latency, goodput"),
    "evaluate": Command("service.evaluate.command", "score a running service on labelled data"),
    "batch": Command("service.batch.command", "have a file of requests answered, a line each"),
    "calibrate": Command("service.calibrate", "fit a classifier's confidence on labelled data"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failure, 2 for a wrong command line or setting."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = {name: entry for name, entry in COMMANDS.items() if importlib.util.find_spec(entry.module) is not None}
    match name:
        case "-h" | "--help":
            print(_overview(commands))
            return 0
        case "-V" | "--version":
            print(f"slimpajama {version('slimpajama')}")
            return 0
        case "serve":
            flags = read_serve_flags(rest)
            return int(importlib.import_module(COMMANDS["serve"].module).run(flags))
    if name in commands:
        return int(importlib.import_module(commands[name].module).main(rest))
    print(f"slimpajama: error: {unknown_name('command', name, commands)}", file=sys.stderr)
    return EXIT_USAGE


def _overview(commands: dict[str, Command]) -> str:
    lines = "\n".join(f"  {name:<10} {command.text}" for name, command in commands.items())
    return f"usage: slimpajama COMMAND ...\n\n{lines}\n\n`slimpajama COMMAND --help` says more."
