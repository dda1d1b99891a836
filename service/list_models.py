"""`slimpajama models PATH ...`: what checkpoint folders and GGUF files hold and can do, without their weights."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model.adapters.config import ADAPTER_CONFIG
from model.adapters.folder import find_base, joined
from model.description import CheckpointDescription, describe
from model.errors import CheckpointError
from model.gguf.container import SUFFIX, models_of
from model.gguf.folder import unpacked
from service.model_source import SHOWN_CHARS

CONFIGS = ("config.json", ADAPTER_CONFIG)


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 if a folder holds nothing that can be served."""
    parser = argparse.ArgumentParser(
        prog="slimpajama models", description=__doc__.partition(": ")[2] if __doc__ else ""
    )
    parser.add_argument("folder", nargs="+", type=Path, help="a checkpoint's folder or GGUF file, or a folder of such")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    num_faults = 0
    for given in options.folder:
        try:
            folders = _checkpoint_folders(given)
        except OSError as error:  # a name longer than any may be, a folder that is not ours to read
            num_faults += 1
            sys.stderr.write(f"slimpajama models: {str(given)[:SHOWN_CHARS]}: {error.strerror}\n")
            continue
        for folder in folders:
            try:
                description = _description(folder)
            except CheckpointError as error:
                num_faults += 1
                sys.stderr.write(f"slimpajama models: {folder}: {error}\n")
                continue
            sys.stdout.write((_as_json if options.json else _as_text)(description) + "\n")
    return 1 if num_faults else 0


def _description(folder: Path) -> CheckpointDescription:
    with unpacked(folder) as plain, joined(plain, find_base(plain, offline=True)) as whole:
        return replace(describe(whole), folder=folder)


def _checkpoint_folders(folder: Path) -> list[Path]:
    if not folder.is_dir() or _is_one(folder):
        return [folder]
    if files := models_of(folder):
        return list(files)
    inner = {path.parent for name in (*CONFIGS, f"*{SUFFIX}") for path in folder.glob(f"*/{name}")}
    found = [[each] if _is_one(each) else models_of(each) for each in sorted(inner)]
    return [path for each in found for path in each] or [folder]


def _is_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CONFIGS) or len(models_of(folder)) == 1


def _as_json(description: CheckpointDescription) -> str:
    return json.dumps(
        {
            "folder": str(description.folder),
            "base": description.base,
            "architecture": description.architecture,
            "version": description.version,
            "tasks": list(description.tasks),
            "context_length": description.context_length,
            "vocab_size": description.vocab_size,
            "labels": list(description.labels),
        }
    )


def _as_text(description: CheckpointDescription) -> str:
    base = f", an adapter of {description.base}" if description.base is not None else ""
    return (
        f"{description.folder}{base}\n"
        f"  {description.architecture}, version {description.version}, context {description.context_length:,} tokens\n"
        f"  tasks: {', '.join(description.tasks)}"
    )
