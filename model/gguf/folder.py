"""A GGUF file unpacked into a folder like those of the hub: JSON files of its keys, its tokenizer, and links to itself.

So everything behind it reads a checkpoint folder as ever; the tensors stay in the file (`model.gguf.tensors`). The
folder is small, is made anew at each start and goes with whoever asked for it. API process.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from model.calibration import FILE_NAME as CALIBRATION_FILE
from model.errors import CheckpointError
from model.gguf.container import GgufFile, files_of
from model.gguf.facts import Facts
from model.gguf.families import read_config
from model.gguf.vocabularies import ends_of_text, write_tokenizer
from model.task_heads import HEADS_FOLDER
from model.temporary_folder import TemporaryFolder

POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}
RANKING = 4
ENCODERS = ("bert", "nomic-bert")
COMPANIONS = (CALIBRATION_FILE, "golden.json")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Defaults that a file may give, to their names in `generation_config.json`."""
_MODULE = "sentence_transformers.models."

log = logging.getLogger("slimpajama.checkpoint")


class Unpacked:
    """A temporary folder that is there for as long as this object is, or until `remove` is called."""

    def __init__(self, location: Path) -> None:
        self.location = location
        """What was unpacked."""
        self._made = TemporaryFolder("gguf")
        self.folder, self.remove = self._made.path, self._made.remove


def unpack(location: Path) -> Unpacked | None:
    """The GGUF file (or set of them) at a path as a checkpoint folder; None if there is none.

    Raises: CheckpointError for a file that is broken or of a kind that is not read.
    """
    files = files_of(location)
    if not files:
        return None
    try:
        made = Unpacked(location)
    except OSError as error:
        raise _no_room(location, error) from error
    try:
        _write(files, made.folder)
    except OSError as error:
        made.remove()
        raise _no_room(location, error) from error
    except BaseException:
        made.remove()
        raise
    return made


def _no_room(location: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot unpack {location} into a temporary folder: {error.strerror}; set TMPDIR")


@contextmanager
def unpacked(location: Path) -> Iterator[Path]:
    """A path as a checkpoint folder: as it is, or unpacked for as long as it is needed."""
    made = unpack(location)
    try:
        yield location if made is None else made.folder
    finally:
        if made is not None:
            made.remove()


def _write(files: Sequence[Path], folder: Path) -> None:
    with ExitStack() as stack:
        facts = Facts([stack.enter_context(GgufFile(path)) for path in files])
        config = read_config(facts)
        num_tokens = len(facts.keys.texts("tokenizer.ggml.tokens"))
        if num_tokens > config["vocab_size"]:
            raise CheckpointError(
                f"{facts.keys.file} lists {num_tokens:,} tokens; its embedding has {config['vocab_size']:,} rows",
                file=facts.keys.file,
                tensor="token_embd.weight",
            )
        _write_json(folder / "config.json", config)
        _write_json(folder / "tokenizer_config.json", write_tokenizer(facts, folder))
        _write_json(folder / "generation_config.json", _generation(facts, config))
        _write_pooling(facts, folder)
    for index, path in enumerate(files, start=1):
        part = "" if len(files) == 1 else f"-{index:05}-of-{len(files):05}"
        (folder / f"model{part}.gguf").symlink_to(path.resolve())
    _link_companions(files[0].absolute().parent, folder)


def _link_companions(beside: Path, folder: Path) -> None:
    """What this service's own tools have put beside the file: it belongs to the checkpoint."""
    heads = beside / HEADS_FOLDER
    for path in (*(beside / name for name in COMPANIONS), *sorted(heads.glob("*/*"))):
        if path.is_file():
            link = folder / path.relative_to(beside)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def _generation(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    found |= {"eos_token_id": ends_of_text(facts)}
    keys = {ours: f"general.sampling.{theirs}" for theirs, ours in SAMPLING.items()}
    return found | {ours: _default(facts, key) for ours, key in keys.items() if key in facts.keys}


def _default(facts: Facts, key: str) -> float:
    if key.endswith("top_k"):
        return facts.keys.whole(key)
    value = facts.keys.number(key)
    if not 0 <= value < math.inf or (value == 0 and key.endswith("penalty_repeat")):
        raise facts.keys.wrong(key, "a finite number, 0 or more (a penalty: above 0)")
    return value


def _write_pooling(facts: Facts, folder: Path) -> None:
    """An embedder's modules: llama.cpp, too, makes unit vectors of what is pooled."""
    pooling = facts.keys.whole(facts.key("pooling_type")) if "pooling_type" in facts else None
    if pooling == RANKING:
        raise facts.refused("rerankers cannot be read of GGUF files")
    if pooling not in POOLING and facts.architecture in ENCODERS:
        if pooling is not None:
            raise facts.refused(f"{facts.key('pooling_type')!r} is {pooling}: vectors of tokens are not served")
        log.warning("%s has no %r: vectors are the mean of its tokens'", facts.keys.file, facts.key("pooling_type"))
    if pooling not in POOLING:
        return
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": ""}
    _write_json(folder / "modules.json", [{"path": path, "type": _MODULE + name} for name, path in places.items()])
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": POOLING[pooling]})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
