"""Embeddings, similarity of sentences, and ranking of documents by either of them.

An embedding checkpoint gives one vector per text; a cross-encoder reads query and document together and gives a score.
Knows neither HTTP nor tensors beyond numpy. Runs in the API process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.embedding_config import ActivationName
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions, Side, run_texts, tokenize

InputType = Literal["query", "document"]
PROMPT_NAMES: dict[InputType, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
"""Under which names sentence-transformers folders keep the prompt of each kind of text."""

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


async def embed(
    engine: EncodeEngine,
    model: LoadedModel,
    texts: Sequence[str],
    options: EncodeOptions,
    *,
    prompt: str = "",
    dimensions: int | None = None,
) -> list[EncodedText]:
    """One vector per text, in `values`; cut to `dimensions` and brought back to unit length where that is asked for."""
    check_dimensions(model, dimensions)
    encoded = await tokenize(model, texts, truncate=options.truncate, prompt=prompt)
    await run_texts(engine, model, encoded, "embedding", options)
    for text in encoded:
        if text.values is not None:
            text.values = shortened(text.values, _wanted_size(model, dimensions))
    return encoded


def check_dimensions(model: LoadedModel, dimensions: int | None) -> None:
    size = model.description.embedding_size
    if dimensions is not None and size is not None and dimensions > size:
        raise InvalidRequest(f"dimensions is {dimensions:,}; {model.name} gives {size:,}", param="dimensions")


def _wanted_size(model: LoadedModel, dimensions: int | None) -> int | None:
    if dimensions is not None:
        return dimensions
    embedding = model.description.embedding
    return embedding.truncated_size if embedding is not None else None


def shortened(vector: Vectors, size: int | None) -> Vectors:
    """The first `size` numbers, at unit length again: a cut vector is of no use for cosine similarity otherwise."""
    if size is None or size >= len(vector):
        return vector
    cut = vector[:size]
    norm = float(np.linalg.norm(cut))
    return cut / norm if norm > 0 else cut


def similarities(model: LoadedModel, left: Vectors, right: Vectors) -> Vectors:
    """Scores of all pairs [rows of left, rows of right] by the checkpoint's own measure; higher is more alike.

    Distances are negated, as sentence-transformers does.
    """
    embedding = model.description.embedding
    scores: Vectors
    match embedding.similarity if embedding is not None else "cosine":
        case "cosine":
            scores = _unit(left) @ _unit(right).T
        case "dot":
            scores = left @ right.T
        case "euclidean":
            scores = -np.linalg.norm(left[:, None] - right[None], axis=-1)
        case _:
            scores = -np.abs(left[:, None] - right[None]).sum(axis=-1)
    return scores


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
) -> tuple[list[PairScore], list[EncodedText]]:
    """Each pair's score or its fault, and all that was read for them, the first pair's first text first.

    An embedding checkpoint reads every distinct text once; a cross-encoder reads each pair together.
    """
    if model.description.head == "cross_encoder":
        ranked = await _score_together(engine, model, pairs, options, side="longest", prompt=prompt)
        return [PairScore(read=(row.encoded,), score=row.score) for row in ranked], [row.encoded for row in ranked]
    distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
    encoded = await embed(engine, model, distinct, options, prompt=prompt)
    found = dict(zip(distinct, encoded, strict=True))
    scores = []
    for first, second in pairs:
        one, other = found[first], found[second]
        pair = PairScore(read=(one, other))
        if one.values is not None and other.values is not None:
            pair.score = float(similarities(model, one.values[None], other.values[None])[0, 0])
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
    raw_scores: bool = False,
) -> list[Ranked]:
    """The documents in their given order with their scores.

    A cross-encoder's score is its logit, under its default prompt, through the checkpoint's own activation (none with
    `raw_scores`); an embedding checkpoint's is the similarity of query and document under their prompts.
    """
    if model.description.head == "cross_encoder":
        pairs = [(query, document) for document in documents]
        prompt = prompt_of(model, prompt_name=None, input_type=None)
        return await _score_together(engine, model, pairs, options, side="second", prompt=prompt, raw_scores=raw_scores)
    return await _rerank_by_embedding(engine, model, query, documents, options)


async def _score_together(
    engine: EncodeEngine,
    model: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    options: EncodeOptions,
    *,
    side: Side,
    prompt: str,
    raw_scores: bool = False,
) -> list[Ranked]:
    encoded = await tokenize(model, pairs, truncate=options.truncate, side=side, prompt=prompt)
    await run_texts(engine, model, encoded, "logits", options)
    activation = None if raw_scores else model.description.score_activation
    return [Ranked(index=index, encoded=text, score=_score(text, activation)) for index, text in enumerate(encoded)]


async def _rerank_by_embedding(
    engine: EncodeEngine, model: LoadedModel, query: str, documents: Sequence[str], options: EncodeOptions
) -> list[Ranked]:
    query_prompt = prompt_of(model, prompt_name=None, input_type="query")
    document_prompt = prompt_of(model, prompt_name=None, input_type="document")
    asked = await tokenize(model, [query], truncate=options.truncate, prompt=query_prompt)
    if asked[0].error is not None:
        asked[0].error.param = "query"
        raise asked[0].error
    encoded = await tokenize(model, documents, truncate=options.truncate, prompt=document_prompt)
    await run_texts(engine, model, [*asked, *encoded], "embedding", options)
    if asked[0].error is not None:
        raise asked[0].error
    assert asked[0].values is not None
    ranked = [Ranked(index=index, encoded=text) for index, text in enumerate(encoded)]
    for entry in ranked:
        if entry.encoded.values is not None:
            entry.score = float(similarities(model, asked[0].values[None], entry.encoded.values[None])[0, 0])
    return ranked


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
