"""Embeddings, similarity of sentences, and ranking of documents by either of them.

An embedding checkpoint gives one vector per text; a cross-encoder reads query and document together and gives a score.
Knows neither HTTP nor tensors beyond numpy. Runs in the API process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from model.embedding_config import ActivationName, Normalize, Similarity
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError, UnsupportedParameter
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions, Side, run_texts, tokenize

InputType = Literal["query", "document"]
PROMPT_NAMES: dict[InputType, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
"""Under which names sentence-transformers folders keep the prompt of each kind of text."""

Scale = Literal["own", "logit", "unit"]
"""Of scores: the checkpoint's own; a cross-encoder's logits as they are; brought into [0, 1], in the same order."""

Vectors = NDArray[np.float32]


def prompt_of(model: LoadedModel, *, prompt_name: str | None, input_type: InputType | None) -> str:
    """The text that the checkpoint wants before each input.

    Raises: InvalidRequest that lists the checkpoint's prompts, for a name that it does not have.
    """
    embedding = model.description.embedding
    prompts = embedding.prompts if embedding is not None else {}
    if prompt_name is not None:
        if prompt_name not in prompts:
            known = ", ".join(prompts) or "none"
            raise InvalidRequest(f"{model.name} has no prompt '{prompt_name}'; it has: {known}", param="prompt_name")
        return prompts[prompt_name]
    if input_type is not None:
        return next((prompts[name] for name in PROMPT_NAMES[input_type] if name in prompts), "")
    default = embedding.default_prompt_name if embedding is not None else None
    return prompts.get(default, "") if default is not None else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorForm:
    """What becomes of a vector that the network has given."""

    dimensions: int | None = None
    """How many of its first numbers are kept; None: as many as the checkpoint's settings say."""
    normalize: bool | None = None
    """Whether it gets unit length; None: as the checkpoint's modules say, and where numbers were left out."""

    def check(self, model: LoadedModel) -> None:
        """Raises: InvalidRequest, UnsupportedParameter for what this checkpoint cannot give."""
        size, embedding = model.description.embedding_size, model.description.embedding
        if self.dimensions is not None and size is not None and self.dimensions > size:
            raise InvalidRequest(f"dimensions is {self.dimensions:,}; {model.name} gives {size:,}", param="dimensions")
        if self.normalize is False and embedding is not None and Normalize() in embedding.steps:
            message = f"normalize: the modules of {model.name} bring its vectors to unit length; there are no others"
            raise UnsupportedParameter(message, param="normalize")

    def size(self, model: LoadedModel) -> int | None:
        if self.dimensions is not None:
            return self.dimensions
        embedding = model.description.embedding
        return embedding.truncated_size if embedding is not None else None

    def final_size(self, model: LoadedModel) -> int | None:
        """Of the vectors in this form."""
        sizes = (self.size(model), model.description.embedding_size)
        return min((size for size in sizes if size is not None), default=None)


AS_TRAINED = VectorForm()


async def embed(
    engine: EncodeEngine,
    model: LoadedModel,
    texts: Sequence[str],
    options: EncodeOptions,
    *,
    prompt: str = "",
    form: VectorForm = AS_TRAINED,
) -> list[EncodedText]:
    """One vector per text, in `values`, in the form that is asked for."""
    form.check(model)
    encoded = await tokenize(model, texts, room=options.room(), prompt=prompt)
    await run_texts(engine, model, encoded, "embedding", options)
    for text in encoded:
        if text.values is not None:
            text.values = _formed(text.values, form.size(model), form.normalize)
    return encoded


def _formed(vector: Vectors, size: int | None, normalize: bool | None) -> Vectors:
    """Unless told otherwise, a cut vector gets unit length again: it is of no use for cosine similarity without."""
    is_cut = size is not None and size < len(vector)
    kept = vector[:size]
    return _unit(kept) if (is_cut if normalize is None else normalize) else kept


def similarities(model: LoadedModel, left: Vectors, right: Vectors, *, measure: Similarity | None = None) -> Vectors:
    """Scores of all pairs [rows of left, rows of right]; higher is more alike. `measure` None: the checkpoint's own.

    Distances are negated, as sentence-transformers does.
    """
    scores: Vectors
    match measure or own_measure(model):
        case "cosine":
            scores = _unit(left) @ _unit(right).T
        case "dot":
            scores = left @ right.T
        case "euclidean":
            scores = -np.linalg.norm(left[:, None] - right[None], axis=-1)
        case _:
            scores = -np.abs(left[:, None] - right[None]).sum(axis=-1)
    return scores


def own_measure(model: LoadedModel) -> Similarity:
    embedding = model.description.embedding
    return embedding.similarity if embedding is not None else "cosine"


def within_unit(score: float, measure: Similarity) -> float:
    """A similarity as a number in [0, 1], in the same order: half of 1 + cosine, 1 / (1 + distance), and for dot
    products, which may be of any size, half of 1 + x / (1 + |x|).

    Worked example: cosines -1, 0 and 0.5 become 0, 0.5 and 0.75; dot products -3, 0 and 4 become 0.125, 0.5 and 0.9.
    """
    match measure:
        case "cosine":
            return min(max((1 + score) / 2, 0.0), 1.0)
        case "dot":
            return (1 + score / (1 + abs(score))) / 2
        case _:
            return 1 / (1 - score)


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit


@dataclass(slots=True, kw_only=True)
class PairScore:
    """How alike the two texts of a pair are, or what is wrong with them; `read` is what it was found from."""

    read: tuple[EncodedText, ...]
    score: float | None = None

    @property
    def error(self) -> ServiceError | None:
        return next((text.error for text in self.read if text.error is not None), None)


async def pair_similarities(
    engine: EncodeEngine,
    model: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    options: EncodeOptions,
    *,
    prompt: str = "",
    scale: Scale = "own",
    measure: Similarity | None = None,
) -> tuple[list[PairScore], list[EncodedText]]:
    """Each pair's score or its fault, and all that was read for them, the first pair's first text first.

    An embedding checkpoint reads every distinct text once, and its vectors are compared by `measure`; a cross-encoder
    reads each pair together, and `scale` is of its scores.
    """
    if model.description.head == "cross_encoder":
        ranked = await _score_together(engine, model, pairs, options, side="longest", prompt=prompt, scale=scale)
        return [PairScore(read=(row.encoded,), score=row.score) for row in ranked], [row.encoded for row in ranked]
    distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
    encoded = await embed(engine, model, distinct, options, prompt=prompt)
    found = dict(zip(distinct, encoded, strict=True))
    scores = []
    for first, second in pairs:
        one, other = found[first], found[second]
        pair = PairScore(read=(one, other))
        if one.values is not None and other.values is not None:
            pair.score = float(similarities(model, one.values[None], other.values[None], measure=measure)[0, 0])
        scores.append(pair)
    return scores, encoded


@dataclass(slots=True, kw_only=True)
class Ranked:
    """One document's relevance to the query, or what is wrong with it. `encoded` counts its tokens."""

    index: int
    encoded: EncodedText
    score: float | None = None


async def rerank(
    engine: EncodeEngine,
    model: LoadedModel,
    query: str,
    documents: Sequence[str],
    options: EncodeOptions,
    *,
    scale: Scale = "own",
) -> tuple[list[Ranked], list[EncodedText]]:
    """The documents in their given order with their scores, and all that was read for them.

    A cross-encoder's own score is its logit, under its default prompt, through the checkpoint's activation; that of an
    embedding checkpoint is the similarity of query and document under their prompts. Where texts are cut, a
    cross-encoder's query is not: each document is compared by it.
    """
    if model.description.head == "cross_encoder":
        pairs = [(query, document) for document in documents]
        prompt = prompt_of(model, prompt_name=None, input_type=None)
        ranked = await _score_together(engine, model, pairs, options, side="second", prompt=prompt, scale=scale)
        return ranked, [entry.encoded for entry in ranked]
    ranked, asked = await _rerank_by_embedding(engine, model, query, documents, options)
    for entry in ranked:
        if entry.score is not None and scale == "unit":
            entry.score = within_unit(entry.score, own_measure(model))
    return ranked, [asked, *(entry.encoded for entry in ranked)]


async def _score_together(
    engine: EncodeEngine,
    model: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    options: EncodeOptions,
    *,
    side: Side,
    prompt: str,
    scale: Scale,
) -> list[Ranked]:
    """By a cross-encoder; a logit comes into [0, 1] by its sigmoid, whatever the checkpoint's activation is."""
    encoded = await tokenize(model, pairs, room=options.room(side=side), prompt=prompt)
    await run_texts(engine, model, encoded, "logits", options)
    activations: dict[Scale, ActivationName | None] = {
        "own": model.description.score_activation, "logit": None, "unit": "sigmoid",
    }  # fmt: skip
    activation = activations[scale]
    return [Ranked(index=index, encoded=text, score=_score(text, activation)) for index, text in enumerate(encoded)]


async def _rerank_by_embedding(
    engine: EncodeEngine, model: LoadedModel, query: str, documents: Sequence[str], options: EncodeOptions
) -> tuple[list[Ranked], EncodedText]:
    """The documents, and the query. Raises: the query's own fault."""
    query_prompt = prompt_of(model, prompt_name=None, input_type="query")
    document_prompt = prompt_of(model, prompt_name=None, input_type="document")
    of_query = replace(options.room(), max_part_tokens=None)
    (asked,) = await tokenize(model, [query], room=of_query, prompt=query_prompt)
    if asked.error is not None:
        asked.error.param = "query"
        raise asked.error
    encoded = await tokenize(model, documents, room=options.room(), prompt=document_prompt)
    await run_texts(engine, model, [asked, *encoded], "embedding", options)
    if asked.error is not None:
        raise asked.error
    assert asked.values is not None
    ranked = [Ranked(index=index, encoded=text) for index, text in enumerate(encoded)]
    for entry in ranked:
        if entry.encoded.values is not None:
            entry.score = float(similarities(model, asked.values[None], entry.encoded.values[None])[0, 0])
    return ranked, asked


def _score(text: EncodedText, activation: ActivationName | None) -> float | None:
    if text.values is None:
        return None
    return _activated(float(text.values[0]), activation)


def _activated(logit: float, activation: ActivationName | None) -> float:
    """What torch's module of that name makes of it; GELU is the exact one."""
    match activation:
        case "sigmoid":
            return _sigmoid(logit)
        case "tanh":
            return float(np.tanh(logit))
        case "relu":
            return max(logit, 0.0)
        case "gelu":
            return logit * 0.5 * (1.0 + math.erf(logit / math.sqrt(2.0)))
        case "silu":
            return logit * _sigmoid(logit)
        case _:
            return logit


def _sigmoid(logit: float) -> float:
    return float(1.0 / (1.0 + np.exp(-np.float64(logit))))
