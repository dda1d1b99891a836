"""Drafts of checkpoints that are to be served: found, matched with what they are to guess for, or refused.

A draft is served under no name: it goes with the version that it guesses for, is loaded and freed with it. Reads small
files and may download, so that it runs on a thread. API process only.
"""

from dataclasses import replace
from pathlib import Path

import msgspec

from model.adapters.folder import find_base
from model.description import describe
from model.errors import UnsupportedArchitectureError
from model.gguf.folder import unpack
from model.hub import resolve
from model.tokenizer import Tokenizer
from service.engine.models import DraftModel, LoadedModel
from service.settings import Settings


def with_draft(model: LoadedModel, location: str, settings: Settings) -> LoadedModel:
    """The checkpoint with the draft that is at a folder, file or hub name. Raises: CheckpointError, if that cannot be
    found or cannot guess for it."""
    description = model.description
    if description.network != "decoder" or description.head != "language_model":
        raise UnsupportedArchitectureError(
            f"'{model.name}' has a draft, {location}, but is no decoder that generates: there is nothing to guess"
        )
    found = resolve(location, revision=settings.revision, cache_dir=settings.cache_dir, offline=settings.offline)
    unpacked = unpack(found)
    folder = found if unpacked is None else unpacked.folder
    try:
        _check(folder, found, model, settings)
    except BaseException:
        if unpacked is not None:
            unpacked.remove()
        raise
    spec = msgspec.structs.replace(model.spec, draft=str(folder))
    return replace(model, spec=spec, draft=DraftModel(str(found), unpacked))


def _check(folder: Path, location: Path, model: LoadedModel, settings: Settings) -> None:
    if find_base(folder, cache_dir=settings.cache_dir, offline=settings.offline) is not None:
        raise UnsupportedArchitectureError(f"{location} is an adapter: a draft is a checkpoint by itself")
    description = describe(folder)
    if description.network != "decoder" or description.head != "language_model":
        raise UnsupportedArchitectureError(
            f"{location} cannot guess tokens for '{model.name}': it is no decoder that generates", file="config.json"
        )
    _check_same_tokens(location, Tokenizer.load(folder), model)


def _check_same_tokens(location: Path, tokenizer: Tokenizer, model: LoadedModel) -> None:
    """Each of the checkpoint's tokens must have the same id in the draft's tokenizer. What that has beyond them, and
    rows of an embedding without a token, make no difference."""
    own, theirs = (entry.backend.get_vocab(with_added_tokens=True) for entry in (tokenizer, model.tokenizer))
    other = [token for token, number in theirs.items() if own.get(token) != number]
    if not other:
        return
    token = min(other, key=lambda token: theirs[token])
    there = own.get(token)
    raise UnsupportedArchitectureError(
        f"{location} cannot guess tokens for '{model.name}': {len(other):,} of that one's {len(theirs):,} have another "
        f"id here, or none; {token!r}, for one, is {theirs[token]} there and {'none' if there is None else there} here",
        file="tokenizer.json",
    )
