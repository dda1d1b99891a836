"""`/v1/embeddings` in OpenAI's shape, `/v1/sparse_embeddings` beside it, and `/v1/similarity`.

HTTP only; what a vector or a similarity is, the tasks know. Runs in the API process, on the event loop.
"""

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.api import native
from service.api.event_stream import until_gone
from service.api.native import (
    MAX_ITEMS,
    EncodeBody,
    FilledText,
    PromptName,
    TextsOrIds,
    check_numbers,
    encode_engine,
    encode_options,
    envelope,
    error_item,
    sparse_vectors,
    truncation,
    usage_of,
    written_one_by_one,
    written_sparse,
)
from service.errors import InvalidRequest
from service.tasks.embeddings import PairScore, VectorForm, embed, pair_similarities, prompt_of
from service.tasks.encoding import EncodedText, raise_if_all_failed
from service.tasks.sparse_embeddings import SPARSE_TASK, entries_of

router = APIRouter(prefix="/v1", tags=["embeddings"])


class TextsBody(EncodeBody):
    input: TextsOrIds
    input_type: Literal["query", "document"] | None = None
    prompt_name: PromptName | None = None


class EmbeddingsBody(TextsBody):
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=65536)
    normalize: bool | None = Field(None, description="to unit length; absent: as the checkpoint's modules say")


@router.post("/embeddings", summary="One vector per text")
async def create_embeddings(request: Request, body: EmbeddingsBody) -> Response:
    texts = _texts(body)
    engine = encode_engine(request)
    model = engine.resolve(body.model, "embed")
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=body.input_type)
    options = encode_options(request, body, "embed")
    form = VectorForm(dimensions=body.dimensions, normalize=body.normalize)
    size = form.final_size(model)
    check_numbers(len(texts), size, param="input")
    work = embed(engine, model, texts, options, prompt=prompt, form=form)
    encoded = await until_gone(request, work)
    raise_if_all_failed(encoded, param="input", single=isinstance(body.input, str))
    if len(texts) * (size or 0) > native.INLINE_NUMBERS:
        data = await asyncio.to_thread(_items, encoded, body.encoding_format)
    else:
        data = _items(encoded, body.encoding_format)
    return envelope(request, model, data, usage_of(encoded))


def _texts(body: TextsBody) -> list[str]:
    given = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(given[0], str):
        raise InvalidRequest(
            "token ids are refused: they may come from another tokenizer, and the vectors would be wrong without a "
            "sign of it. Send text (LangChain: check_embedding_ctx_length=False)",
            param="input",
        )
    return [text for text in given if isinstance(text, str)]


def _items(texts: Sequence[EncodedText], form: str) -> list[msgspec.Raw]:
    """Written one by one: all of their numbers as Python's would take several times the memory."""
    return written_one_by_one(_item(index, text, form) for index, text in enumerate(texts))


def _item(index: int, text: EncodedText, form: str) -> dict[str, Any]:
    """A text that failed has no vector and says why; OpenAI's clients give it as None and the others as they are."""
    item: dict[str, Any] = {"object": "embedding", "index": index}
    if text.error is not None:
        return item | {"embedding": None, "error": error_item(text.error)}
    return item | {"embedding": _vector(text, form)} | truncation([text])


def _vector(text: EncodedText, form: str) -> Any:
    assert text.values is not None
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(text.values, dtype="<f4").tobytes()).decode()
    return text.values.tolist()


@router.post("/sparse_embeddings", summary="The weights of the vocabulary's entries, per text")
async def create_sparse_embeddings(request: Request, body: TextsBody) -> Response:
    texts = _texts(body)
    model = encode_engine(request).resolve(body.model, SPARSE_TASK)
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=body.input_type)
    options = encode_options(request, body, SPARSE_TASK)
    encoded = await sparse_vectors(request, model, texts, options, prompt=prompt, param="input")
    raise_if_all_failed(encoded, param="input", single=isinstance(body.input, str))
    data = await written_sparse(encoded, _sparse_items)
    return envelope(request, model, data, usage_of(encoded))


def _sparse_items(texts: Sequence[EncodedText]) -> list[msgspec.Raw]:
    return written_one_by_one(_sparse_item(index, text) for index, text in enumerate(texts))


def _sparse_item(index: int, text: EncodedText) -> dict[str, Any]:
    item: dict[str, Any] = {"object": "sparse_embedding", "index": index}
    if text.error is not None:
        return item | {"sparse": None, "error": error_item(text.error)}
    assert text.values is not None
    indices, values = entries_of(text.values)
    return item | {"sparse": {"indices": indices, "values": values}} | truncation([text])


TextPair = Annotated[list[FilledText], Field(min_length=2, max_length=2)]


class SimilarityBody(EncodeBody):
    """Either one `source` against all `targets`, or `pairs` (lists of two), each for itself."""

    source: FilledText | None = None
    targets: Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    pairs: Annotated[list[TextPair], Field(min_length=1, max_length=MAX_ITEMS // 2)] | None = None
    prompt_name: PromptName | None = None


@router.post("/similarity", summary="How alike texts are")
async def create_similarity(request: Request, body: SimilarityBody) -> Response:
    left, right = _sides(body)
    engine = encode_engine(request)
    model = engine.resolve(body.model, "similarity")
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=None)
    options = encode_options(request, body, "similarity")
    pairs = list(zip(left, right, strict=True))
    scored, read = await until_gone(request, pair_similarities(engine, model, pairs, options, prompt=prompt))
    places = ("source", "targets.0") if body.pairs is None else ("pairs.0", "pairs.0")
    raise_if_no_pair_is_left(scored, places)
    data = [pair_item(index, pair) for index, pair in enumerate(scored)]
    return envelope(request, model, data, usage_of(read))


def raise_if_no_pair_is_left(scored: Sequence[PairScore], places: tuple[str, str]) -> None:
    """A pair's error stays with it, unless all have one: then the first is the request's.

    `places` are the fields of the first pair's texts; where both were read together, the second is the one at fault.
    """
    error, read = scored[0].error, scored[0].read
    if error is not None and all(pair.error is not None for pair in scored):
        error.param = places[0] if len(read) == 2 and read[0].error is not None else places[1]
        raise error


def pair_item(index: int, pair: PairScore) -> dict[str, Any]:
    if pair.error is not None:
        return {"index": index, "error": error_item(pair.error)}
    return {"index": index, "score": pair.score, **truncation(pair.read)}


def _sides(body: SimilarityBody) -> tuple[list[str], list[str]]:
    if body.pairs is not None:
        if body.source is not None or body.targets is not None:
            raise InvalidRequest("pairs exclude source and targets", param="pairs")
        return [first for first, _ in body.pairs], [second for _, second in body.pairs]
    if body.source is None:
        raise InvalidRequest("source (or pairs) is missing", param="source")
    if body.targets is None:
        raise InvalidRequest("targets is missing", param="targets")
    return [body.source] * len(body.targets), body.targets
