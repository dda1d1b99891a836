"""Adapters over a checkpoint that is served: found, matched with their base, described, or refused.

Such an adapter is served under a name of its own, and computed in its base's steps, beside it and others. Reads small
files and may download, so that it runs on a thread. API process only.
"""

import os
from dataclasses import replace
from pathlib import Path

import msgspec

from model.adapters.config import AdapterConfig, read_adapter_config
from model.adapters.folder import TOKENIZER_FILES, is_adapter, joined
from model.adapters.places import shared_pairs
from model.chat_template import ChatTemplate
from model.description import describe, read_architecture
from model.errors import CheckpointError, HubError, UnsupportedArchitectureError
from model.hub import fetch, resolve
from model.tokenizer import Tokenizer
from service.engine.models import LoadedModel, ModelDirectory
from service.model_source import ModelSource
from service.settings import Settings


def load_adapter(source: ModelSource, settings: Settings, models: ModelDirectory) -> LoadedModel:
    """Raises: CheckpointError, if it cannot be found, is not what it should be or has no base among `models`."""
    folder = resolve(
        source.location, revision=settings.revision, cache_dir=settings.cache_dir, offline=settings.offline
    )
    if not is_adapter(folder):
        raise CheckpointError(f"{folder} is no LoRA adapter: it has no adapter_config.json, or whole weights beside it")
    base = _base_of(folder, read_adapter_config(folder), settings, models)
    base_folder = Path(base.spec.folder)
    try:
        shared_pairs(folder, base_folder)
    except CheckpointError as error:
        error.args = (f"{folder}: {error}",)
        raise
    with joined(folder, base_folder) as whole:
        description = describe(whole, base.spec.max_model_len)
        _check_same_network(folder, whole, base)
        tokenizer, chat_template = _tokenizer(folder, whole, base), ChatTemplate.load(whole)
    version = source.version or description.version
    key = f"{source.name}@{version}"
    return LoadedModel(
        name=source.name,
        version=version,
        spec=msgspec.structs.replace(
            base.spec,
            key=key,
            folder=str(folder),
            base=base.spec.folder,
            shares=base.key,
            draft=None,
            kv_cache_bytes=None,
        ),
        description=replace(description, folder=folder),
        tokenizer=tokenizer,
        chat_template=chat_template,
        base=base,
    )


def _base_of(folder: Path, config: AdapterConfig, settings: Settings, models: ModelDirectory) -> LoadedModel:
    """The checkpoint that the adapter's settings name: by its folder, or by a name that it is served under.

    Of a hub name the last part will do (`Llama-3.2-1B` of `meta-llama/Llama-3.2-1B`), also of a folder that is not
    there. Of a name with several versions it is the one that has the name itself.
    """
    names = models.names()
    beside = folder / os.path.expanduser(config.base)
    if config.base and os.path.isdir(beside):  # which is False for names that no system takes
        found = _at(beside, models) or names.get(config.base)
    else:
        found = next((model for model in models.values() if model.asked_for == config.base), None)
        found = found or names.get(config.base) or _at(_cached(config, settings), models)
        found = found or names.get(Path(config.base).name)
    if found is None:
        raise CheckpointError(
            f"{folder}: its base, {config.base!r} by adapter_config.json, is not served; give it as --model, or let "
            f"--alias {Path(config.base).name or 'NAME'}=NAME say which of these it is: {', '.join(names) or 'none'}"
        )
    if found.spec.base is not None:
        raise UnsupportedArchitectureError(f"{folder}: its base, '{found.name}', is an adapter itself")
    if found.description.network != "decoder" or found.description.head != "language_model":
        raise UnsupportedArchitectureError(f"{folder}: its base, '{found.name}', is no decoder that generates")
    return found


def _at(folder: Path | None, models: ModelDirectory) -> LoadedModel | None:
    if folder is None:
        return None
    return next((model for model in models.values() if Path(model.location).resolve() == folder.resolve()), None)


def _cached(config: AdapterConfig, settings: Settings) -> Path | None:
    """Where the hub's cache has the base, which may be served as a folder."""
    try:
        return fetch(config.base, config.base_revision, cache_dir=settings.cache_dir, offline=True)
    except HubError:
        return None


def _check_same_network(folder: Path, whole: Path, base: LoadedModel) -> None:
    """The adapter's folder may have a `config.json` of its own."""
    configs = []
    for source in (whole, Path(base.spec.folder)):
        raw, _, architecture = read_architecture(source)
        configs.append(architecture.configure(raw, base.spec.max_model_len))
    if configs[0] != configs[1]:
        raise UnsupportedArchitectureError(
            f"{folder}: its config.json asks for another network than its base's, '{base.name}': serve it merged, with "
            "--model",
            file="config.json",
        )


def _tokenizer(folder: Path, whole: Path, base: LoadedModel) -> Tokenizer:
    """The base's own where the folder has nothing else. What texts become may differ; what ids mean may not, for the
    rows of its embedding and the grammars are the base's."""
    own = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    theirs = Path(base.spec.folder)
    if all((theirs / name).is_file() and _same(folder / name, theirs / name) for name in own):
        return base.tokenizer
    tokenizer = Tokenizer.load(whole)
    vocabularies = [entry.backend.get_vocab(with_added_tokens=True) for entry in (tokenizer, base.tokenizer)]
    if vocabularies[0] != vocabularies[1]:
        raise UnsupportedArchitectureError(
            f"{folder}: its tokenizer has other tokens than its base's, '{base.name}': serve it merged, with --model",
            file="tokenizer.json",
        )
    return tokenizer


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()
