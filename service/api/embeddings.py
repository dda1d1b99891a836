"""`/v1/embeddings` in OpenAI's shape, `/v1/similarity`, and `/v1/rerank` in Cohere's and Jina's.

HTTP only; what a vector or a score is, the tasks know. Runs in the API process, on the event loop.
"""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.generating import new_id
from service.api.native import (
    MAX_ITEMS,
    FilledText,
    InputText,
    NativeBody,
    TextsOrIds,
    encode_engine,
    encode_options,
    envelope,
    error_item,
    json_response,
    note,
    truncation,
    usage_of,
)
from service.api.schemas_openai import Strict
from service.errors import InvalidRequest
from service.tasks.embeddings import PairScore, Ranked, embed, pair_similarities, prompt_of, rerank
from service.tasks.encoding import EncodedText, raise_if_all_failed

router = APIRouter(prefix="/v1", tags=["embeddings"])


class EmbeddingsBody(NativeBody):
    input: TextsOrIds
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=65536)
    input_type: Literal["query", "document"] | None = None
    prompt_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None


@router.post("/embeddings", summary="One vector per text")
async def create_embeddings(request: Request, body: EmbeddingsBody) -> Response:
    texts = _texts(body)
    engine = encode_engine(request)
    model = engine.resolve(body.model, "embed")
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=body.input_type)
    options = encode_options(request, body, "embed")
    work = embed(engine, model, texts, options, prompt=prompt, dimensions=body.dimensions)
    encoded = await until_gone(request, work)
    raise_if_all_failed(encoded, param="input", single=isinstance(body.input, str))
    data = [_item(index, text, body.encoding_format) for index, text in enumerate(encoded)]
    return envelope(request, model, data, usage_of(encoded))


def _texts(body: EmbeddingsBody) -> list[str]:
    given = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(given[0], str):
        raise InvalidRequest(
            "token ids are refused: they may come from another tokenizer, and the vectors would be wrong without a "
            "sign of it. Send text (LangChain: check_embedding_ctx_length=False)",
            param="input",
        )
    return [text for text in given if isinstance(text, str)]


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


TextPair = Annotated[list[FilledText], Field(min_length=2, max_length=2)]


class SimilarityBody(NativeBody):
    """Either one `source` against all `targets`, or `pairs` (lists of two), each for itself."""

    source: FilledText | None = None
    targets: Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    pairs: Annotated[list[TextPair], Field(min_length=1, max_length=MAX_ITEMS // 2)] | None = None
    prompt_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None


@router.post("/similarity", summary="How alike texts are")
async def create_similarity(request: Request, body: SimilarityBody) -> Response:
    left, right = _sides(body)
    engine = encode_engine(request)
    model = engine.resolve(body.model, "similarity")
    prompt = prompt_of(model, prompt_name=body.prompt_name, input_type=None)
    options = encode_options(request, body, "similarity")
    pairs = list(zip(left, right, strict=True))
    scored, read = await until_gone(request, pair_similarities(engine, model, pairs, options, prompt=prompt))
    first = scored[0].error
    if first is not None and all(pair.error is not None for pair in scored):
        alone = model.description.head == "embedding" and read[0].error is not None
        first.param = "pairs.0" if body.pairs is not None else "source" if alone else "targets.0"
        raise first
    data = [_pair(index, pair) for index, pair in enumerate(scored)]
    return envelope(request, model, data, usage_of(read))


def _pair(index: int, pair: PairScore) -> dict[str, Any]:
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


class DocumentObject(Strict):
    text: InputText


class RerankBody(NativeBody):
    query: FilledText
    documents: Annotated[list[InputText | DocumentObject], Field(min_length=1, max_length=MAX_ITEMS)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    raw_scores: bool = Field(False, description="a cross-encoder's logits, without its activation")


@router.post("/rerank", summary="Documents by relevance to a query")
async def create_rerank(request: Request, body: RerankBody) -> Response:
    documents = [entry if isinstance(entry, str) else entry.text for entry in body.documents]
    engine = encode_engine(request)
    model = engine.resolve(body.model, "rerank")
    options = encode_options(request, body, "rerank")
    work = rerank(engine, model, body.query, documents, options, raw_scores=body.raw_scores)
    ranked = await until_gone(request, work)
    texts = [entry.encoded for entry in ranked]
    raise_if_all_failed(texts, param="documents", single=False)
    usage = usage_of(texts)
    note(request, model, usage)
    scored = sorted((entry for entry in ranked if entry.score is not None), key=_best_first)
    results = [_result(entry, documents, body.return_documents) for entry in scored[: body.top_n]]
    faults = [(entry.index, entry.encoded.error) for entry in ranked]
    errors = [{"index": index, "error": error_item(error)} for index, error in faults if error is not None]
    answer = {
        "id": new_id("rerank"), "object": "list", "model": model.name, "model_version": model.version,
        "results": results, "usage": usage, "meta": {"billed_units": {"search_units": 1}, "tokens": usage},
    }  # fmt: skip
    if errors:
        answer["errors"] = errors
    return json_response(answer)


def _best_first(entry: Ranked) -> tuple[float, int]:
    assert entry.score is not None
    return -entry.score, entry.index


def _result(entry: Ranked, documents: list[str], with_document: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"index": entry.index, "relevance_score": entry.score, **truncation([entry.encoded])}
    if with_document:
        result["document"] = {"text": documents[entry.index]}
    return result
