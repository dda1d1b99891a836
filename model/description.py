"""What a checkpoint folder is and can do, read from its JSON files alone.

Opens no weights (beyond a fingerprint of them) and imports no torch, so that the API process can answer for a
checkpoint that the worker is still loading. Both processes.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from model.adapters.config import ADAPTER_CONFIG, JOINED_FOLDER, read_adapter_config
from model.architectures.mapping import Architecture, Head, Network
from model.architectures.raw import RawConfig, read_json
from model.architectures.table import ARCHITECTURES, bare_class, usual_classes
from model.calibration import FILE_NAME as CALIBRATION_FILE
from model.calibration import Calibration, read_calibration
from model.declared_rules import DeclaredRules, read_declared_rules
from model.embedding_config import ActivationName, EmbeddingConfig, pools, read_embedding_config, score_activation
from model.errors import CheckpointError, UnsupportedArchitectureError
from model.generation_defaults import (
    DECODER_ENDS,
    GenerationDefaults,
    read_generation_defaults,
    sequence_to_sequence_tasks,
)
from model.gguf.container import GgufFile, files_of
from model.quantized.config import read_quantization
from model.remarks import tell_of_length, tell_of_own_code, tell_of_what_is_left_out
from model.sentiment_labels import valences
from model.splade_config import masked_lm
from model.task_heads import TaskHeadConfig, TaskHeadKind, read_task_heads

LANGUAGE_MODEL_TASKS = ("generate", "chat", "classify", "sentiment", "summarize", "translate", "answer")
EMBEDDING_TASKS = ("embed", "similarity", "rerank", "classify", "sentiment", "summarize")
SPARSE_TASK = "embed_sparse"
TASKS_OF_HEADS: Mapping[TaskHeadKind, str] = {"span": "answer", "token": "token_classify"}
EMBEDDERS: tuple[Head, ...] = ("embedding", "sparse_embedding", "cross_encoder")
LABELLED: tuple[Head, ...] = ("sequence_classification", "token_classification", "cross_encoder")
DIGESTED = (".json", ".jinja", ".model", ".spm", ".txt", ".safetensors")
SAMPLED_BYTES = 4 << 10
MAX_HEADER_BYTES = 100 << 20
MAX_FILE_BYTES = 1 << 50
SMALL_BYTES = 100 << 20
"""Weights of fewer bytes (50 million parameters in 16 bits) follow the form of an instruction, hardly its meaning."""
NOT_DEFAULTS = re.compile(r".*_token_id|_from_model_config|transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDescription:
    """A checkpoint as the service sees it. `version` changes when its config, tokenizer or weights do."""

    folder: Path
    architecture: str
    model_type: str
    network: Network
    head: Head
    tasks: tuple[str, ...]
    context_length: int
    vocab_size: int
    version: str
    labels: tuple[str, ...] = ()
    """Names of a classification head's outputs, by index."""
    problem_type: str | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    decoder_start_id: int | None = None
    has_chat_template: bool = False
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    """`generation_config.json` without its token ids."""
    declared_rules: DeclaredRules = field(default_factory=DeclaredRules)
    """Decoders: bans and the like from `generation_config.json`."""
    sequence_to_sequence: GenerationDefaults | None = None
    """Encoder-decoders: how the checkpoint wants to be decoded."""
    embedding: EmbeddingConfig | None = None
    """Embedders and cross-encoders: prompts, length limit and what follows the network."""
    embedding_size: int | None = None
    """Of a text's vector."""
    hidden_size: int | None = None
    """Of a token's vector."""
    score_activation: ActivationName | None = None
    """Cross-encoders: what turns a logit into the score that the checkpoint means."""
    weight_bytes: int | None = None
    """Of the stored weights; None where nobody has looked."""
    heads: Mapping[str, TaskHeadConfig] = field(default_factory=dict)
    """Small heads on an embedder's body, by name."""
    calibration: Calibration = field(default_factory=Calibration)
    base: str | None = None
    """An adapter's: the name of the checkpoint that it was trained on."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """`config.json` as it is."""

    @property
    def small(self) -> bool:
        return self.weight_bytes is not None and self.weight_bytes < SMALL_BYTES


def describe(folder: Path | str, max_model_len: int | None = None) -> CheckpointDescription:
    """Describes the checkpoint in a local folder; `max_model_len` lowers (rarely: extends) its context length.

    Raises: CheckpointError (UnsupportedArchitectureError among them), naming the file at fault.
    """
    folder = Path(folder)
    raw, name, architecture = read_architecture(folder)
    config = architecture.configure(raw, max_model_len)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    ids = [RawConfig(generation, generation_path.name), raw]
    ids += [raw.section("text_config")] if "text_config" in raw else []
    labels = _labels(raw)
    template = has_chat_template(folder)
    head = _head(folder, architecture, labels)
    embedding = read_embedding_config(folder) if head in EMBEDDERS else None
    if embedding is not None and embedding.scores:
        head, labels = "cross_encoder", ()
    _check_output(folder, raw, head, config, embedding)
    seq2seq = architecture.network == "encoder_decoder"
    generates = head == "language_model" and not seq2seq
    eos_ids = _ids(ids, "eos_token_id") or (_usual_ends(ids, config.vocab_size) if generates else ())
    tell_of_own_code(folder, raw, name)
    tell_of_length(folder, config, max_model_len)
    if generates:
        tell_of_what_is_left_out(folder, ids[0])
    heads = read_task_heads(folder) if head == "embedding" else {}
    sparse = (SPARSE_TASK,) if head in ("embedding", "sparse_embedding") and _reads_vocabulary(config) else ()
    version = fingerprint(folder)
    return CheckpointDescription(
        folder=folder,
        architecture=name,
        model_type=raw.text("model_type", ""),
        network=architecture.network,
        head=head,
        tasks=sequence_to_sequence_tasks(raw) if seq2seq else _tasks(head, labels, template, heads) + sparse,
        context_length=_context_length(config.context_length, embedding),
        vocab_size=config.vocab_size,
        version=version,
        labels=labels if head in LABELLED else (),
        problem_type=raw.text("problem_type") if "problem_type" in raw else None,
        eos_ids=eos_ids,
        bos_id=next(iter(_ids(ids, "bos_token_id")), None),
        pad_id=next(iter(_ids(ids, "pad_token_id")), None),
        decoder_start_id=next(iter(_ids(ids, "decoder_start_token_id")), None),
        has_chat_template=template,
        generation_defaults={key: value for key, value in generation.items() if not NOT_DEFAULTS.fullmatch(key)},
        declared_rules=read_declared_rules(ids[0], eos_ids) if generates else DeclaredRules(),
        sequence_to_sequence=read_generation_defaults(folder, raw, config.context_length) if seq2seq else None,
        embedding=embedding,
        embedding_size=embedding.size(config.hidden_size) if embedding is not None and head == "embedding" else None,
        hidden_size=config.hidden_size,
        score_activation=score_activation(folder, raw, max(len(labels), 1)) if head == "cross_encoder" else None,
        weight_bytes=_weight_bytes(folder),
        heads=heads,
        calibration=read_calibration(folder, version),
        base=_base(folder),
        raw=raw.values,
    )


def _base(folder: Path) -> str | None:
    adapter = folder / JOINED_FOLDER
    return read_adapter_config(adapter).base_name if (adapter / ADAPTER_CONFIG).is_file() else None


def _check_output(folder: Path, raw: RawConfig, head: Head, config: Any, embedding: EmbeddingConfig | None) -> None:
    """Raises UnsupportedArchitectureError where a checkpoint gives something that is not served."""
    if head == "language_model" and not getattr(config, "causal", True):
        raise UnsupportedArchitectureError(
            f"{raw.file}: a decoder without causal attention is an embedder, not a language model", file=raw.file
        )
    if head == "embedding" and embedding is not None and not embedding.pools:
        raise UnsupportedArchitectureError(
            f"{folder}: modules.json has no Pooling; a vector per token (ColBERT) is not supported", file="modules.json"
        )


def read_architecture(folder: Path) -> tuple[RawConfig, str, Architecture[Any]]:
    """A folder's `config.json`, the name of its architecture and that architecture's row of the table.

    Raises: CheckpointError if there is no such file, UnsupportedArchitectureError if no row fits.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    raw = RawConfig(read_json(folder / "config.json"))
    read_quantization(raw)  # refuses what the worker could not read
    names = raw.texts("architectures") if "architectures" in raw else usual_classes(raw.text("model_type", ""))
    for name in names:
        if name in ARCHITECTURES:
            name = bare_class(name) if pools(folder) else name
            return raw, *(masked_lm(folder, raw, name) or (name, ARCHITECTURES[name]))
    asked = ", ".join(names) or "no architecture"
    known = ", ".join(sorted(ARCHITECTURES))
    raise UnsupportedArchitectureError(f"{folder}: config.json names {asked}; supported: {known}", file="config.json")


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    paths = [folder / name for name in ("chat_template.json", "tokenizer_config.json")]
    return any(path.is_file() and bool(read_json(path).get("chat_template")) for path in paths)


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that change with the checkpoint: small files whole, weights by samples of each tensor.

    Reading gigabytes at each start would cost more than the certainty is worth. A calibration is no part of what it was
    fitted on. Raises: CheckpointError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in DIGESTED or path == folder / CALIBRATION_FILE or not path.is_file():
            continue
        digest.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size};".encode())
        try:
            with path.open("rb") as file:
                if path.suffix == ".safetensors":
                    _digest_weights(file, digest.update)
                else:
                    digest.update(file.read())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}", file=path.name) from error
    for path in files_of(folder):
        with GgufFile(path) as gguf:
            for sample in gguf.samples():
                digest.update(sample)
    return digest.hexdigest()[:12]


def _digest_weights(file: BinaryIO, update: Callable[[bytes], None]) -> None:
    """Takes in a safetensors header and both ends of every tensor; a broken file is for the loader to refuse."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, MAX_HEADER_BYTES))
    update(header)
    try:
        entries = json.loads(header)
        ranges = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        ends = [(8 + length + int(start), 8 + length + int(end)) for start, end in ranges]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    for start, end in sorted(ends):
        for offset in (start, max(start, end - SAMPLED_BYTES)):
            if 0 <= offset < MAX_FILE_BYTES:
                file.seek(offset)
                update(file.read(SAMPLED_BYTES))


def _weight_bytes(folder: Path) -> int:
    """Of the files that are read: `consolidated.safetensors` holds the same weights once more. Of GGUF files as if each
    weight had 16 bits."""
    if ggufs := files_of(folder):
        return sum(_num_values(path) for path in ggufs) * 2
    files = [file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _num_values(path: Path) -> int:
    with GgufFile(path) as gguf:
        return sum(math.prod(info.shape) for info in gguf.tensors.values())


def _ids(sections: list[RawConfig], key: str) -> tuple[int, ...]:
    """The ids of the first section that has any."""
    for section in sections:
        if key in section:
            value = section.values[key]
            found = value if isinstance(value, list) else [value]
            if not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
                raise section.wrong(key, "an id or a list of ids")
            return tuple(found)
    return ()


def _usual_ends(sections: list[RawConfig], vocab_size: int) -> tuple[int, ...]:
    """The ends of a text where no file names any, nor says that there are none: those of its class in transformers."""
    if any("eos_token_id" in section.values for section in sections):
        return ()
    found = DECODER_ENDS.get(sections[-1].text("model_type", ""), ())
    return tuple(id for id in found if id < vocab_size)


def _labels(raw: RawConfig) -> tuple[str, ...]:
    """Names of a head's outputs; transformers writes none where there are the usual two."""
    if "id2label" not in raw:
        return tuple(f"LABEL_{index}" for index in range(raw.size("num_labels", 2)))
    names = raw.section("id2label").values
    try:
        return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))
    except ValueError as error:
        raise raw.wrong("id2label", "an object whose keys are numbers") from error


def _head(folder: Path, architecture: Architecture[Any], labels: tuple[str, ...]) -> Head:
    # A sentence-transformers folder says what its modules make of the network, whatever head config.json names.
    # (Its cross-encoders also have the file since 5.x, and keep their classification head.)
    kept = ("sequence_classification", "cross_encoder", "sparse_embedding")
    if (folder / "modules.json").is_file() and architecture.head not in kept:
        return "embedding"
    if architecture.head == "sequence_classification" and len(labels) == 1:
        return "cross_encoder"
    return architecture.head


def _reads_vocabulary(config: Any) -> bool:
    head = getattr(config, "head", None)
    return head is not None and head.kind == "vocabulary"


def _context_length(length: int, embedding: EmbeddingConfig | None) -> int:
    """An embedder's own limit is often below what its network can read."""
    if embedding is None or embedding.max_length is None:
        return length
    return min(length, embedding.max_length)


def _tasks(head: Head, labels: tuple[str, ...], template: bool, heads: Mapping[str, TaskHeadConfig]) -> tuple[str, ...]:
    if head == "language_model":
        return tuple(task for task in LANGUAGE_MODEL_TASKS if task != "chat" or template)
    if head == "embedding":
        kinds = {config.kind for config in heads.values()}
        return EMBEDDING_TASKS + tuple(task for kind, task in TASKS_OF_HEADS.items() if kind in kinds)
    if head == "sparse_embedding":
        return ()  # sparse vectors alone
    if head == "cross_encoder":
        return ("rerank", "similarity", "classify") if labels else ("rerank", "similarity")
    if head == "token_classification":
        return ("token_classify",)
    if head == "question_answering":
        return ("answer",)
    lowered = {label.lower() for label in labels}
    if any(label.startswith("entail") for label in lowered):
        return ("classify", "zero_shot", "sentiment")
    return ("classify", "sentiment") if valences(labels) else ("classify",)
