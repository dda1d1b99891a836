"""What the encoder families share: the rows of the table for one family's heads, and their heads' sizes.

Each family's file gives the network; the class names in `config.json` (`BertModel`, `BertForSequenceClassification`)
differ only in what is read off it. Knows no tensors; both processes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

from model.architectures.mapping import Architecture, Head, Part, WeightMap, part, parts
from model.architectures.raw import RawConfig
from model.config import Activation, EncoderConfig, HeadConfig
from model.errors import UnsupportedArchitectureError

Kind = Literal["sequence", "token", "span", "vocabulary"]

CLASSES: Mapping[str, tuple[Head, Kind | None]] = {
    "Model": ("embedding", None),
    "ForMaskedLM": ("embedding", None),
    "ForPreTraining": ("embedding", None),
    "ForSequenceClassification": ("sequence_classification", "sequence"),
    "ForTokenClassification": ("token_classification", "token"),
    "ForQuestionAnswering": ("question_answering", "span"),
}

TENSORFLOW_NORMS = ((".gamma", ".weight"), (".beta", ".bias"))
"""How checkpoints converted from TensorFlow call the two parameters of a norm."""


UNUSED = (
    r".*embeddings\.position_ids",
    r".*embeddings\.token_type_ids",
    r"(cls|lm_head|classifier|pre_classifier|qa_outputs)\..*",
)
"""Buffers of older checkpoints, the heads of pre-training, and those of classifiers where their states are pooled."""


class Configure(Protocol):
    def __call__(self, raw: RawConfig, limit: int | None, kind: Kind | None) -> EncoderConfig: ...


def family(
    prefix: str,
    configure: Configure,
    weights: Callable[[EncoderConfig], WeightMap],
    *,
    classes: Collection[str] = tuple(CLASSES),
) -> dict[str, Architecture[EncoderConfig]]:
    """The rows of one family, by class name; `classes` are those that there are of it."""

    def named(name: str, kind: Kind | None) -> Callable[[RawConfig, int | None], EncoderConfig]:
        return partial(_configured, configure, name, kind)

    return {
        prefix + suffix: Architecture(
            network="encoder", head=head, configure=named(prefix + suffix, kind), weights=weights
        )
        for suffix, (head, kind) in CLASSES.items()
        if suffix in classes
    }


def masked_lm(
    prefix: str, configure: Configure, weights: Callable[[EncoderConfig], WeightMap]
) -> dict[str, Architecture[EncoderConfig]]:
    """The row of one family's masked language model whose head over the vocabulary is read."""
    name = f"{prefix}ForMaskedLM"
    configured = partial(_configured, configure, name, "vocabulary")
    return {name: Architecture(network="encoder", head="sparse_embedding", configure=configured, weights=weights)}


def _configured(configure: Configure, name: str, kind: Kind | None, raw: RawConfig, limit: int | None) -> EncoderConfig:
    return replace(configure(raw, limit, kind), architecture=name)


def without(*left_out: str) -> tuple[str, ...]:
    """The classes of a family that lacks some."""
    return tuple(name for name in CLASSES if name not in left_out)


def only(raw: RawConfig, values: Mapping[str, Any]) -> None:
    """Raises UnsupportedArchitectureError for a key that is there with another value than the one that is computed."""
    for key, value in values.items():
        if key in raw and raw.values[key] != value:
            shown = repr(raw.values[key])[:80]
            raise UnsupportedArchitectureError(f"{raw.file}: {key} {shown} is not supported", file=raw.file)


def head_size(raw: RawConfig, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise raw.wrong("num_attention_heads", f"a divisor of the hidden size {hidden_size}")
    return hidden_size // num_heads


def num_labels(raw: RawConfig) -> int:
    """Outputs of a classification head; `config.json` leaves the labels out where there are the usual two."""
    if "id2label" in raw:
        return len(raw.section("id2label").values)
    return raw.size("num_labels", 2)


def plain_head(raw: RawConfig, kind: Kind) -> HeadConfig:
    """One linear layer over each token."""
    return HeadConfig(kind=kind, num_outputs=2 if kind == "span" else num_labels(raw))


def vocabulary_head(raw: RawConfig, *, activation: Activation, epsilon: float) -> HeadConfig:
    """BERT's head for masked tokens: dense, activation, norm, and the embedding's matrix with a bias of its own."""
    return HeadConfig(
        kind="vocabulary",
        num_outputs=raw.size("vocab_size", 30522),
        dense=True,
        activation=activation,
        norm=True,
        norm_bias=True,
        norm_epsilon=epsilon,
    )


def vocabulary_head_parts(dense: str, norm: str, output: str) -> dict[str, tuple[Part, ...]]:
    """That head's parameters under a family's names."""
    return biased("head.dense", dense) | biased("head.norm", norm) | biased("head.output", output)


def tied_head(
    config: EncoderConfig, parameters: Mapping[str, tuple[Part, ...]], *, bias: str | None = None
) -> tuple[tuple[str, ...], ...]:
    """The aliases of a head over the vocabulary: its matrix is the embedding's, `bias` another name of its bias."""
    if config.head is None or config.head.kind != "vocabulary" or not config.head.tied:
        return ()
    (embedding,), (output,) = parameters["embedding.tokens.weight"], parameters["head.output.weight"]
    tied = (embedding.name, output.name)
    return (tied,) if bias is None else (tied, (bias, parameters["head.output.bias"][0].name))


def biased(ours: str, theirs: str, *, bias: bool = True) -> dict[str, tuple[Part, ...]]:
    """The weight of a projection or norm, and its bias where it has one."""
    found = {f"{ours}.weight": part(f"{theirs}.weight")}
    if bias:
        found[f"{ours}.bias"] = part(f"{theirs}.bias")
    return found


def fused(ours: str, *theirs: str, bias: bool = True) -> dict[str, tuple[Part, ...]]:
    """Several stored projections as one of ours, one below the other."""
    found = {f"{ours}.weight": parts(*(f"{name}.weight" for name in theirs))}
    if bias:
        found[f"{ours}.bias"] = parts(*(f"{name}.bias" for name in theirs))
    return found
