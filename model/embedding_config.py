"""What a sentence-transformers folder says: how token states become a vector or a score, how texts are prepared.

Reads `modules.json`, each module's `config.json`, `sentence_bert_config.json` and `config_sentence_transformers.json`
in the layout before and since sentence-transformers 5.4. Opens no weights and imports no torch; both processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from model.architectures.raw import RawConfig, read_json, read_json_list
from model.errors import UnsupportedArchitectureError
from model.text_messages import MessageFormat, read_message_format

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
ActivationName = Literal["identity", "sigmoid", "tanh", "relu", "gelu", "silu"]

POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
OLD_POOLING_KEYS: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which several modes are concatenated."""
TORCH_ACTIVATIONS: Mapping[str, ActivationName] = {
    "Identity": "identity",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
}
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
LONGEST_MEANT_LENGTH = 1 << 30
"""Tokenizers without a limit store 10^30 as theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One vector from a text's token states; several modes are concatenated."""

    modes: tuple[PoolingMode, ...]
    include_prompt: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A projection, its weights in `folder`."""

    folder: Path
    in_size: int
    out_size: int
    bias: bool
    activation: ActivationName
    residual: bool
    scores: bool = False
    """Its output is a cross-encoder's logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A LayerNorm, its weights in `folder`."""

    folder: Path
    size: int


@dataclass(frozen=True, slots=True)
class Normalize:
    """To unit length."""


Step = Pooling | Dense | Norm | Normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitScore:
    """A decoder's relevance score: the last position's logit of one token, less that of another."""

    true_id: int
    false_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """`steps` follow the transformer; a folder without `modules.json` has mean pooling alone."""

    steps: tuple[Step, ...]
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_length: int | None = None
    lowercase: bool = False
    similarity: Similarity = "cosine"
    truncated_size: int | None = None
    """Only so many leading numbers of each vector are meant to be used."""
    logit_score: LogitScore | None = None
    messages: MessageFormat | None = None
    """Where texts go through the chat template."""

    @property
    def normalized(self) -> bool:
        """Whether the last step makes unit vectors."""
        return bool(self.steps) and isinstance(self.steps[-1], Normalize)

    @property
    def scores(self) -> bool:
        """Whether the modules end in a cross-encoder's logits, not in a vector."""
        return self.logit_score is not None or any(isinstance(step, Dense) and step.scores for step in self.steps)

    @property
    def pools(self) -> bool:
        """Whether a text becomes one vector; else each of its tokens is one."""
        return any(isinstance(step, Pooling) for step in self.steps)

    @property
    def include_prompt(self) -> bool:
        return all(step.include_prompt for step in self.steps if isinstance(step, Pooling))

    def size(self, hidden_size: int) -> int:
        """Length of the vectors made from states of `hidden_size`."""
        for step in self.steps:
            if isinstance(step, Pooling):
                hidden_size *= len(step.modes)
            elif isinstance(step, Dense):
                hidden_size = step.out_size
        return hidden_size if self.truncated_size is None else min(hidden_size, self.truncated_size)


def read_embedding_config(folder: Path) -> EmbeddingConfig:
    """The folder's modules and settings.

    Raises: CheckpointError, UnsupportedArchitectureError for a module that we have no counterpart of.
    """
    steps, score = _modules(folder)
    settings = _optional(folder / "config_sentence_transformers.json")
    transformer = transformer_settings(folder)
    prompts = settings.section("prompts").values if "prompts" in settings else {}
    # Names that belong to other kinds of models ("maxsim") are stored by conversions and mean nothing here.
    named: str = settings.text("similarity_fn_name", "cosine")
    similarities: dict[str, Similarity] = {name: name for name in get_args(Similarity)}
    return EmbeddingConfig(
        steps=steps,
        prompts={name: text for name, text in prompts.items() if isinstance(text, str)},
        default_prompt_name=settings.text("default_prompt_name") if "default_prompt_name" in settings else None,
        max_length=_max_length(folder, transformer),
        lowercase=transformer.flag("do_lower_case", False),
        similarity=similarities.get(named, "cosine"),
        truncated_size=settings.size("truncate_dim") if "truncate_dim" in settings else None,
        logit_score=score,
        messages=read_message_format(transformer),
    )


def transformer_settings(folder: Path) -> RawConfig:
    """`sentence_bert_config.json`, or what it is called for other networks; empty where there is none."""
    found = next((raw for name in TRANSFORMER_FILES if (raw := _optional(folder / name)).values), None)
    return RawConfig({}, TRANSFORMER_FILES[0]) if found is None else found


def module_config(folder: Path, entry: RawConfig) -> RawConfig:
    """The settings of an entry of `modules.json`, empty where it has none."""
    place = entry.text("path", "")
    # A module's folder is a bare name: the file must not be able to point out of its folder.
    if place != Path(place).name:
        raise entry.wrong("path", "the name of a folder beside it")
    return _optional(folder / place / "config.json") if place else RawConfig({}, entry.file)


def pools(folder: Path) -> bool:
    """Whether the folder's modules pool the states of its network, whatever head `config.json` names."""
    path = folder / "modules.json"
    return path.is_file() and any(str(entry.get("type")).endswith(".Pooling") for entry in read_json_list(path))


def score_activation(folder: Path, raw: RawConfig, num_labels: int) -> ActivationName:
    """What `CrossEncoder.predict` applies to logits: as stored, else a sigmoid for one label, nothing for more."""
    settings = _optional(folder / "config_sentence_transformers.json")
    nested = raw.section("sentence_transformers") if "sentence_transformers" in raw else RawConfig({}, raw.file)
    for source, key in (
        (settings, "activation_fn"),
        (nested, "activation_fn"),
        (raw, "sbert_ce_default_activation_function"),
    ):
        if key in source:
            return activation(source, key)
    return "sigmoid" if num_labels == 1 else "identity"


def activation(raw: RawConfig, key: str) -> ActivationName:
    """A dotted torch class as one of our names: nothing is imported by name.

    Raises: CheckpointError for any other.
    """
    module, _, name = raw.text(key).rpartition(".")
    if not module.startswith("torch.") or name not in TORCH_ACTIVATIONS:
        raise raw.wrong(key, f"torch.nn's {', '.join(TORCH_ACTIVATIONS)}")
    return TORCH_ACTIVATIONS[name]


def _modules(folder: Path) -> tuple[tuple[Step, ...], LogitScore | None]:
    path = folder / "modules.json"
    if not path.is_file():
        return (Pooling(modes=("mean",)),), None
    steps: list[Step] = []
    score = None
    for index, entry in enumerate(read_json_list(path)):
        raw = RawConfig(entry, path.name)
        name, place = raw.text("type").rpartition(".")[2], raw.text("path", "")
        if index == 0:
            _check_transformer(name, place, path)
            continue
        config = module_config(folder, raw)
        if name == "LogitScore":
            false_id = config.whole("false_token_id") if "false_token_id" in config else None
            score = LogitScore(true_id=config.whole("true_token_id"), false_id=false_id)
        elif name not in ("Dropout", "SpladePooling"):  # the latter is `model.splade_config`'s
            steps.append(_step(name, folder / place, config))
    return tuple(steps), score


def _check_transformer(name: str, place: str, path: Path) -> None:
    if name not in ("Transformer", "MLMTransformer"):
        raise UnsupportedArchitectureError(f"{path}: a first module of type {name} is not supported", file=path.name)
    if place:
        raise UnsupportedArchitectureError(
            f"{path} keeps its transformer in {place!r}; move that folder's files beside it and set its path to ''",
            file=path.name,
        )


def _step(name: str, folder: Path, config: RawConfig) -> Step:
    if name == "Pooling":
        return _pooling(config)
    scores = name == "Dense" and config.text("module_output_name", "sentence_embedding") == "scores"
    for key in ("module_input_name", "module_output_name"):
        if config.text(key, "sentence_embedding") != "sentence_embedding" and not (scores and "output" in key):
            raise UnsupportedArchitectureError(f"{folder}: {key} {config.text(key)!r} is not supported")
    if name == "Normalize":
        return Normalize()
    if name == "LayerNorm":
        return Norm(folder=folder, size=config.size("dimension"))
    if name == "Dense":
        return Dense(
            folder=folder,
            in_size=config.size("in_features"),
            out_size=config.size("out_features"),
            bias=config.flag("bias", True),
            activation=activation(config, "activation_function") if "activation_function" in config else "tanh",
            residual=config.flag("use_residual", False),
            scores=scores,
        )
    raise UnsupportedArchitectureError(f"{folder}: a module of type {name} is not supported", file="modules.json")


def _pooling(config: RawConfig) -> Pooling:
    """Since 5.4 `pooling_mode`, a name or a list; before that a flag per mode."""
    include_prompt = config.flag("include_prompt", True)
    if "pooling_mode" not in config:
        modes = tuple(mode for key, mode in OLD_POOLING_KEYS.items() if config.flag(key, False))
        return Pooling(modes=modes or ("mean",), include_prompt=include_prompt)
    value = config.values["pooling_mode"]
    names = (value,) if isinstance(value, str) else config.texts("pooling_mode")
    known = {str(mode): mode for mode in POOLING_MODES}
    if not names or not set(names) <= set(known):
        raise config.wrong("pooling_mode", f"one or more of {', '.join(known)}")
    return Pooling(modes=tuple(known[name] for name in names), include_prompt=include_prompt)


def _max_length(folder: Path, transformer: RawConfig) -> int | None:
    """Before 5.4 `max_seq_length`; since then the tokenizer's own limit."""
    if "max_seq_length" in transformer:
        return transformer.size("max_seq_length")
    tokenizer = _optional(folder / "tokenizer_config.json")
    if "model_max_length" not in tokenizer:
        return None
    length = tokenizer.number("model_max_length")
    return int(length) if 0 < length < LONGEST_MEANT_LENGTH else None


def _optional(path: Path) -> RawConfig:
    values: dict[str, Any] = read_json(path) if path.is_file() else {}
    return RawConfig(values, path.name)
