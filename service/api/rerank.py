"""Documents by relevance: `/v1/rerank` in the shape of Cohere, Jina and vLLM, `/v2/rerank` as Cohere's second version.

Both answer alike. Under /v1 a score is the checkpoint's own, and a document that is too long is an error of its own;
under /v2, whose clients count on it, a score lies in [0, 1] and documents are cut, and say so. HTTP only; what a score
is, the tasks know. Runs in the API process, on the event loop.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from msgspec.structs import replace
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.generating import new_id
from service.api.native import (
    MAX_ITEMS,
    EncodeBody,
    FilledText,
    InputText,
    encode_engine,
    encode_options,
    error_item,
    json_response,
    note,
    truncation,
    usage_of,
)
from service.api.schemas_openai import INT32
from service.errors import InvalidRequest
from service.tasks.embeddings import Ranked, Scale, rerank
from service.tasks.encoding import EncodeOptions, raise_if_all_failed

router = APIRouter(tags=["embeddings"])

COHERE_MAX_TOKENS_PER_DOC = 4096
"""To so many tokens that service cuts documents, unless it is told otherwise."""

Document = InputText | dict[str, Any]
"""A text, or an object whose `text` (or whose `rank_fields`) is read."""


def _of_other_shape(value: object, check: ValidatorFunctionWrapHandler) -> object:
    if value is not None:
        raise ValueError(
            "the name that text-embeddings-inference has for documents, at /rerank alone: give texts or documents, "
            "not both"
        )
    return check(value)


class DocumentsBody(EncodeBody):
    query: FilledText
    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_ITEMS)]
    texts: Annotated[None, WrapValidator(_of_other_shape)] = None
    top_n: int | None = Field(None, ge=1)
    rank_fields: Annotated[list[FilledText], Field(min_length=1, max_length=64)] | None = Field(
        None, description="what is read of documents that are objects, a line each; absent: `text`"
    )
    return_documents: bool = False
    max_tokens_per_doc: int | None = Field(None, ge=1, le=INT32, description="cut documents to so many tokens")


class RerankBody(DocumentsBody):
    raw_scores: bool = Field(False, description="a cross-encoder's logits, without its activation")
    max_chunks_per_doc: Literal[1] | None = None
    """A document is read in one piece."""


@router.post("/v1/rerank", summary="Documents by relevance to a query")
async def create_rerank(request: Request, body: RerankBody) -> Response:
    options = encode_options(request, body, "rerank")
    return await _answer(request, body, options, scale="logit" if body.raw_scores else "own")


class CohereRerankBody(DocumentsBody):
    priority: int = Field(0, ge=0, le=999, description="0 comes first: the other way round than elsewhere")


@router.post("/v2/rerank", summary="Documents by relevance to a query, in the shape of Cohere's second version")
async def create_relevance(request: Request, body: CohereRerankBody) -> Response:
    if body.max_tokens_per_doc is None:
        body.max_tokens_per_doc = COHERE_MAX_TOKENS_PER_DOC
    options = replace(encode_options(request, body, "rerank"), priority=-body.priority)
    return await _answer(request, body, options, scale="unit")


async def _answer(request: Request, body: DocumentsBody, options: EncodeOptions, *, scale: Scale) -> Response:
    documents = [_text(index, document, body.rank_fields) for index, document in enumerate(body.documents)]
    if body.max_tokens_per_doc is not None:
        options = replace(options, truncate=options.truncate or True, max_part_tokens=body.max_tokens_per_doc)
    engine = encode_engine(request)
    model = engine.resolve(body.model, "rerank")
    ranked, read = await until_gone(request, rerank(engine, model, body.query, documents, options, scale=scale))
    raise_if_all_failed([entry.encoded for entry in ranked], param="documents", single=False)
    usage = usage_of(read)
    note(request, model, usage)
    scored = sorted((entry for entry in ranked if entry.score is not None), key=_best_first)
    faults = [(entry.index, entry.encoded.error) for entry in ranked]
    errors = [{"index": index, "error": error_item(error)} for index, error in faults if error is not None]
    answer = {
        "id": new_id("rerank"), "object": "list", "model": model.name, "model_version": model.version,
        "results": [_result(entry, body) for entry in scored[: body.top_n]],
        "usage": usage, "meta": {"billed_units": {"search_units": 1}, "tokens": usage},
    }  # fmt: skip
    if errors:
        answer["errors"] = errors
    return json_response(answer)


def _text(index: int, document: Document, rank_fields: list[str] | None) -> str:
    """What is read of a document. Raises: InvalidRequest that names the field which is not there, or no text."""
    if isinstance(document, str):
        return document
    parts = []
    for name in rank_fields or ("text",):
        part = document.get(name)
        if not isinstance(part, str):
            place = f"documents.{index}.{name[:64]}"
            raise InvalidRequest(f"{place}: {'this field is required' if part is None else 'give text'}", param=place)
        parts.append(part)
    return "\n".join(parts)


def _best_first(entry: Ranked) -> tuple[float, int]:
    assert entry.score is not None
    return -entry.score, entry.index


def _result(entry: Ranked, body: DocumentsBody) -> dict[str, Any]:
    result: dict[str, Any] = {"index": entry.index, "relevance_score": entry.score, **truncation([entry.encoded])}
    if body.return_documents:
        document = body.documents[entry.index]
        result["document"] = {"text": document} if isinstance(document, str) else document
    return result
