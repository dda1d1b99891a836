"""An adapter's folder and its base's as one folder, such as any checkpoint has: links to the files of both.

So whatever reads a checkpoint needs to know nothing of adapters, but for what fills a network
(`model.adapters.merging`). Tokenizer, chat template, sentence modules and generation settings are the adapter's where
it has them, else the base's. The folder is there while something is read: each process makes its own. No torch; both
processes.
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from safetensors import SafetensorError, safe_open

from model.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, JOINED_FOLDER, AdapterConfig, read_adapter_config
from model.adapters.derived_config import CLASSIFIES, Shapes, derived_config
from model.adapters.names import adapter_tensors
from model.architectures.raw import read_json
from model.calibration import FILE_NAME as CALIBRATION_FILE
from model.description import has_chat_template
from model.errors import CheckpointError, HubError, UnsupportedArchitectureError
from model.hub import fetch
from model.task_heads import HEADS_FOLDER
from model.temporary_folder import TemporaryFolder

WHOLE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "source.spm"),
)
TOKENIZER_FILES = frozenset(
    (*VOCABULARIES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", "target.spm")
)
TEMPLATE_FILES = frozenset({"chat_template.jinja", "chat_template.json"})
TEMPLATE_FOLDER = "additional_chat_templates"
NOT_THE_BASES = frozenset({CONFIG, CALIBRATION_FILE, "golden.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS})
"""What was measured of the base alone is not true of the two together; nor are heads trained on its states."""

Files = dict[str, Path]
"""By their names in the joined folder."""


@dataclass(frozen=True, slots=True)
class Header:
    """A tensor's type, as safetensors names it, and its shape."""

    kind: str
    shape: tuple[int, ...]


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter alone; one that has the merged weights too is a checkpoint like any other."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in WHOLE_WEIGHTS)


def find_base(
    folder: Path, *, cache_dir: Path | str | None = None, offline: bool = False, endpoint: str | None = None
) -> Path | None:
    """The folder of the checkpoint that an adapter was trained on, fetched where need be; None for no adapter.

    A way that is not absolute begins in the adapter's folder, never in the process's own. Raises: CheckpointError.
    """
    if not is_adapter(folder):
        return None
    config = read_adapter_config(folder)
    beside = folder / os.path.expanduser(config.base)
    try:
        found = (
            beside.resolve()
            if config.base and os.path.isdir(beside)  # which is False for names that no system takes
            else fetch(config.base, config.base_revision, cache_dir=cache_dir, offline=offline, endpoint=endpoint)
        )
    except HubError as error:
        raise HubError(
            f"{folder}: its base, {config.base!r} by {ADAPTER_CONFIG}, is not the folder {beside}, and {error}"
        ) from error
    if is_adapter(found):
        raise UnsupportedArchitectureError(
            f"{folder}: its base, {found}, is an adapter itself: merge that one into its own base first",
            file=ADAPTER_CONFIG,
        )
    return found


@contextmanager
def joined(folder: Path, base: Path | None) -> Iterator[Path]:
    """The folder itself where it has no base, else one of links to both folders' files, until the block ends.

    Errors that leave the block name the files behind the links. Raises: CheckpointError.
    """
    if base is None:
        yield folder
        return
    try:
        made = TemporaryFolder("adapter")
    except OSError as error:
        raise _not_joined(folder, base, error) from error
    whole = made.path / folder.resolve().name
    links: Files = {}
    try:
        try:
            _join(whole, folder, base, links)
        except OSError as error:
            raise _not_joined(folder, base, error) from error
        yield whole
    except CheckpointError as error:
        error.args = (_with_origins(str(error), whole, {CONFIG: base / CONFIG} | links | {JOINED_FOLDER: folder}),)
        raise
    finally:
        made.remove()


def _not_joined(folder: Path, base: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder} and its base {base} cannot be joined in {gettempdir()}: {error}")


def _with_origins(message: str, whole: Path, origins: Files) -> str:
    """The message with the user's files in place of a folder that nobody will find any more."""
    for name in sorted(origins, key=len, reverse=True):
        message = message.replace(str(whole / name), str(origins[name]))
    return message.replace(str(whole), str(origins[JOINED_FOLDER]))


def _join(whole: Path, folder: Path, base: Path, links: Files) -> None:
    """Fills the joined folder, and `links` with what its links stand for."""
    adapter, shapes = read_adapter_config(folder), _whole_shapes(folder)
    own = {name: path for name, path in _files(folder).items() if not name.endswith(".safetensors") or "/" in name}
    config = derived_config(
        read_json(base / CONFIG), read_json(own[CONFIG]) if CONFIG in own else None, adapter, shapes
    )
    keeps_template = not has_chat_template(folder)
    links |= _of_base(_files(base), own, adapter, keeps_template=keeps_template) | own
    links |= {f"{JOINED_FOLDER}/{name}": folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    whole.mkdir(exist_ok=True)
    for name, path in links.items():
        if name not in (CONFIG, ADAPTER_CONFIG):
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).symlink_to(path.absolute())
    _write(whole / CONFIG, config)
    if keeps_template and has_chat_template(base) and not has_chat_template(whole):
        _write(whole / "chat_template.json", {"chat_template": read_json(base / TOKENIZER_CONFIG)["chat_template"]})


def _write(path: Path, value: object) -> None:
    """Writes a new file, in the place of a link rather than through it."""
    path.unlink(missing_ok=True)
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file)


def _of_base(files: Files, own: Collection[str], adapter: AdapterConfig, *, keeps_template: bool) -> Files:
    """Those of the base's files that hold beside the adapter's."""
    keeps_tokenizer = not any(name in own for name in VOCABULARIES)
    keeps_modules = "modules.json" not in own and adapter.task not in CLASSIFIES

    def holds(name: str) -> bool:
        parent = name.partition("/")[0] if "/" in name else ""
        if name in NOT_THE_BASES or parent in (HEADS_FOLDER, JOINED_FOLDER):
            return False
        if name in TEMPLATE_FILES or parent == TEMPLATE_FOLDER:
            return keeps_template
        if name == "modules.json" or name.startswith(("sentence_", "config_sentence_transformers")):
            return keeps_modules
        return keeps_tokenizer or name not in TOKENIZER_FILES

    return {name: path for name, path in files.items() if holds(name)}


def _files(folder: Path, depth: int = 2) -> Files:
    """The folder's files, `heads/<task>/` among them, without what trainers and tools leave there."""
    found: Files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            found[path.name] = path
        elif depth and path.is_dir() and not path.name.startswith((".", "checkpoint-")):
            found |= {f"{path.name}/{name}": inner for name, inner in _files(path, depth - 1).items()}
    return found


def _whole_shapes(folder: Path) -> Shapes:
    """Shapes of what the adapter has whole, by parameter."""
    headers = read_headers(folder)
    tensors = adapter_tensors(headers)
    return {tensor.parameter: headers[name].shape for name, tensor in tensors.items() if tensor.part is None}


def read_headers(folder: Path) -> dict[str, Header]:
    """What the adapter's file says of its tensors, by their stored names. Raises: CheckpointError, also for none."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickle = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()), None)
        reason = f" but as {pickle}, a pickle, which can run code when it is read; convert it" if pickle else ""
        raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}{reason}", file=ADAPTER_WEIGHTS)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            headers = {name: Header(entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}", file=path.name) from error
    if not adapter_tensors(headers):
        raise CheckpointError(f"{path} holds no tensors: it changes nothing of its base", file=path.name)
    return headers
