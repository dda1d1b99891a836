"""What makes a checkpoint a sparse encoder (SPLADE, arXiv 2107.05720, 2109.10086), by its files alone.

Either its `modules.json` pools a masked language model's logits (`SpladePooling`, in the layout before and since
sentence-transformers 5.4), or it is a bare masked language model with its head, as SparseEncoder takes one. Reads names
of tensors, not their values, and imports no torch; both processes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from model.architectures.mapping import Architecture, WeightMap
from model.architectures.raw import RawConfig, read_json, read_json_list
from model.architectures.table import MASKED_LMS, masked_lm_class
from model.embedding_config import module_config, transformer_settings
from model.errors import UnsupportedArchitectureError

MAX_HEADER_BYTES = 100 << 20

Strategy = Literal["max", "sum"]
SpladeActivation = Literal["relu", "log1p_relu"]
STRATEGIES: Mapping[str, Strategy] = {"max": "max", "sum": "sum"}
ACTIVATIONS: Mapping[str, SpladeActivation] = {"relu": "relu", "log1p_relu": "log1p_relu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Splade:
    """How the logits of a text's tokens become one weight per entry of the vocabulary. The defaults are SPLADE v2's."""

    strategy: Strategy = "max"
    activation: SpladeActivation = "relu"
    """relu: log(1 + relu(x)). log1p_relu: log(1 + log(1 + relu(x))) (arXiv 2504.14839)."""
    max_entries: int | None = None
    """The most that a text's vector may have that are not zero: its largest."""


def read_splade(folder: Path) -> Splade | None:
    """What the folder's modules say; None where they pool no logits, or there are none.

    Raises: CheckpointError, UnsupportedArchitectureError for modules that have no meaning together.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    entries = [RawConfig(entry, path.name) for entry in read_json_list(path)]
    names = [entry.text("type").rpartition(".")[2] for entry in entries]
    if "SpladePooling" not in names:
        if names and _gives_logits(folder, names[0]):
            raise _wrong(folder, "a masked language model's logits are pooled by SpladePooling, which is not there")
        return None
    if not _gives_logits(folder, names[0]):
        raise _wrong(folder, 'SpladePooling reads the logits of a Transformer whose transformer_task is "fill-mask"')
    others = [name for name in names[1:] if name not in ("SpladePooling", "Dropout")]
    if others or names.count("SpladePooling") > 1:
        raise _wrong(folder, f"{others[0] if others else 'a second one'} beside SpladePooling is not supported")
    config = module_config(folder, entries[names.index("SpladePooling")])
    settings_path = folder / "config_sentence_transformers.json"
    settings = RawConfig(read_json(settings_path) if settings_path.is_file() else {}, settings_path.name)
    return Splade(
        strategy=config.choice("pooling_strategy", STRATEGIES, "max"),
        activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        max_entries=settings.size("max_active_dims") if "max_active_dims" in settings else None,
    )


def masked_lm(folder: Path, raw: RawConfig, name: str) -> tuple[str, Architecture[Any]] | None:
    """The class of a folder whose head over the vocabulary is read, and its row; None where it is not.

    A bare masked language model stays the embedder that SentenceTransformer makes of it, and is a sparse encoder as
    well, if the head is stored.
    Raises: UnsupportedArchitectureError for a sparse encoder on a network whose head we don't have.
    """
    if read_splade(folder) is not None:
        found = masked_lm_class(name)
        if found not in MASKED_LMS:
            known = ", ".join(sorted(MASKED_LMS))
            raise UnsupportedArchitectureError(
                f"{folder}: sparse embeddings of {name} are not supported; supported: {known}", file="config.json"
            )
        return found, MASKED_LMS[found]
    if name not in MASKED_LMS or (folder / "modules.json").is_file():
        return None
    row = MASKED_LMS[name]
    if not _has_head(folder, row.weights(row.configure(raw, None))):
        return None
    return name, replace(row, head="embedding")


def _gives_logits(folder: Path, name: str) -> bool:
    usual = "fill-mask" if name == "MLMTransformer" else "feature-extraction"
    return transformer_settings(folder).text("transformer_task", usual) == "fill-mask"


def _wrong(folder: Path, message: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"{folder}: modules.json: {message}", file="modules.json")


def _has_head(folder: Path, weights: WeightMap) -> bool:
    """Whether all of the head is stored; its matrix may be the embedding's (`aliases`)."""
    stored = _stored_names(folder)
    for old, new in weights.renamed:
        stored = {name.replace(old, new) for name in stored}
    same = {name: group for group in weights.aliases for name in group}
    own = [key for key in weights.parameters if key.startswith("head.")]
    wanted = [part.name for key in own for part in weights.parameters[key]]
    return all(stored.intersection(same.get(name, (name,))) for name in wanted)


def _stored_names(folder: Path) -> set[str]:
    """Of the tensors in the folder's files, by their headers; a broken file is for the loader to refuse."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        if not path.is_file():  # a pipe of that name would be waited for
            continue
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, MAX_HEADER_BYTES))
            names |= set(json.loads(header))
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return names
