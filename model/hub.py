"""Where a checkpoint lies on disk: a folder or GGUF file as it is, or a name on the Hugging Face hub, fetched.

What is fetched is what serving needs: configs, tokenizer files and safetensors, never pickles. Knows nothing of what
the files mean. Runs on a thread of the API process while it starts; the worker is given a folder.
"""

import re
from pathlib import Path

from model.errors import HubError
from model.gguf.container import SUFFIX as GGUF_SUFFIX

WANTED = ["*.json", "*.safetensors", "*.model", "*.spm", "*.jinja", "merges.txt", "vocab.txt"]
UNWANTED = ["onnx/*", "openvino/*", "original/*", "coreml/*", "*.onnx.json", "*/adapter_model.safetensors"]
UNWANTED += ["consolidated*.safetensors"]
"""The same weights in the layout of another library (Mistral's), adapters at steps of their training, among others."""
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_NAME = re.compile(rf"{_PART}(/{_PART})?")


def resolve(
    location: str,
    *,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    offline: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The local folder (or GGUF file) of a checkpoint; one that exists wins over a hub name.

    `revision` is a branch, tag or commit of the hub (not used for folders): a commit is what pins it. What is in the
    cache already is not fetched again, and a download that was cut off goes on where it stopped. Progress is shown on
    stderr. `offline` uses the cache alone.

    Raises: HubError, whose message says what to do.
    """
    try:
        folder = Path(location).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long; a home of nobody; a null character
        raise HubError(f"{location[:100]} is no path: {error}") from error
    if location and (is_folder or (is_file and folder.suffix == GGUF_SUFFIX)):
        return folder.resolve() if is_folder else folder.absolute()
    if location.endswith(GGUF_SUFFIX):
        raise HubError(f"{location}: no such file")
    return fetch(location, revision, cache_dir=cache_dir, offline=offline, endpoint=endpoint)


def fetch(
    name: str,
    revision: str | None = None,
    *,
    cache_dir: Path | str | None = None,
    offline: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The local copy of a checkpoint on the hub, as `resolve`, whatever folders there are.

    Raises: HubError.
    """
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name:
        raise HubError(f"{name} is not a folder, nor a GGUF file, nor a hub name like organization/model")
    # The hub's client takes longer to import than the service does to start, and a local folder has no need of it.
    from huggingface_hub import errors, snapshot_download

    # The error of its HTTP library (httpx or httpx2, by the client's version), of which its own errors are a kind.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    at = f" at revision {revision}" if revision else ""
    try:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            endpoint=endpoint,
        )
    except errors.GatedRepoError as error:
        raise HubError(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name} is neither a folder nor a model that the hub knows (private ones need HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision} on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        why = "offline mode is on" if offline else "the hub cannot be reached"
        raise HubError(f"{name}{at} is not (completely) in the local cache, and {why}") from error
    except (http_error, OSError, ValueError) as error:
        raise HubError(f"cannot fetch {name}{at} from the hub: {error}") from error
    return Path(found)
