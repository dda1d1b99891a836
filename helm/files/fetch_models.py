"""Fetches what `models[].hub` names into the cache volume, and links each to the folder that is served.

An adapter's base is fetched with it, and found in the cache when the service starts; but not where it is to share the
weights of another entry (`adapter`).

FETCH_MODELS is a JSON list of {name, repository, revision, adapter, folder}. A hub that cannot be reached is no reason
not to start if the cache has the model already. Runs once in each pod, before the service, in the service's image.
"""

import json
import os
import sys
from pathlib import Path

from model.adapters.folder import find_base
from model.errors import CheckpointError, HubError
from model.hub import resolve


def fetch(repository: str, revision: str | None, endpoint: str | None, *, shares_base: bool = False) -> Path:
    try:
        found = resolve(repository, revision=revision, endpoint=endpoint)
        if not shares_base:
            find_base(found, endpoint=endpoint)
        return found
    except HubError as error:
        try:
            cached = resolve(repository, revision=revision, offline=True)
            if not shares_base:
                find_base(cached, offline=True)
        except HubError:
            raise error from None
        print(f"{error}; going on with what the cache has", file=sys.stderr)
        return cached


def link(folder: Path, target: Path) -> None:
    """Replaces in one step: another replica may be starting from the same volume."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, folder.parent))
    partial.replace(folder)


def main() -> int:
    for entry in json.loads(os.environ["FETCH_MODELS"]):
        try:
            endpoint = os.environ.get("HF_ENDPOINT")
            found = fetch(
                entry["repository"], entry["revision"] or None, endpoint, shares_base=entry.get("adapter", False)
            )
        except CheckpointError as error:
            print(f"{entry['name']}: {error}", file=sys.stderr)
            return 1
        link(Path(entry["folder"]), found)
        print(f"{entry['name']}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
