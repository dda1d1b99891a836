"""Addresses without /v1, as clients of text-embeddings-inference, infinity, vLLM and SageMaker know them.

Where two servers have the same address, the body's fields tell which is meant. Nothing is done here: each request goes
to the handler of its shape. HTTP only. Runs in the API process, on the event loop.
"""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api import embeddings, models, rerank, tei, tei_tokens, tokenize
from service.api.classify import classify_engine, raise_if_all_failed, truncation, way_of_address
from service.api.event_stream import until_gone
from service.api.generating import new_id
from service.api.native import (
    EncodeBody,
    checked,
    encode_options,
    envelope,
    error_item,
    json_response,
    usage_of,
)
from service.api.schemas_chat import DetokenizeBody, TokenizeBody
from service.tasks.classification import Classification, classify_own
from service.tasks.confidence import Scored, best_first

router = APIRouter(tags=["roots"])

router.post("/embeddings", summary="The same as /v1/embeddings")(embeddings.create_embeddings)
router.get("/models", summary="The same as /v1/models")(models.list_models)


def _has(*names: str) -> Discriminator:
    """Tells bodies apart: those with one of these fields are the `named`, others the `other`."""
    return Discriminator(
        lambda body: (
            "named" if isinstance(body, dict) and any(body.get(name) is not None for name in names) else "other"
        )
    )


AnyRerankBody = Annotated[
    Annotated[rerank.RerankBody, Tag("named")] | Annotated[tei.RerankBody, Tag("other")], Body(), _has("documents")
]
AnyTokenizeBody = Annotated[
    Annotated[tei_tokens.TokenizeBody, Tag("named")] | Annotated[TokenizeBody, Tag("other")], Body(), _has("inputs")
]


@router.post("/rerank", summary="By relevance: `texts` as text-embeddings-inference, `documents` as /v1/rerank")
async def rerank_of_either_shape(request: Request, body: AnyRerankBody) -> Response:
    if isinstance(body, tei.RerankBody):
        return await tei.tei_rerank(request, body)
    return await rerank.create_rerank(request, body)


@router.post("/tokenize", summary="Tokens: `inputs` as text-embeddings-inference, `prompt` or `messages` as vLLM")
async def tokenize_of_either_shape(request: Request, body: AnyTokenizeBody) -> Response:
    if isinstance(body, TokenizeBody):
        return await tokenize.tokenize(request, body)
    return await tei_tokens.tei_tokenize(request, body)


@router.post("/detokenize", summary="The same as /v1/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    return json_response((await tokenize.detokenize(request, body)).model_dump())


@router.post("/invocations", summary="The same as POST /, as SageMaker asks for it")
@router.post("/", summary="/embed, /embed_sparse, /predict or /rerank, whichever the checkpoint is for")
async def whatever_the_checkpoint_is_for(request: Request, body: dict[str, Any]) -> Response:
    """What has a query is to be ranked; else the checkpoint decides that an unnamed request of these shapes gets."""
    if body.get("query") is not None:
        if body.get("documents") is not None:
            return await rerank.create_rerank(request, checked(rerank.RerankBody, body))
        return await tei.tei_rerank(request, checked(tei.RerankBody, body))
    head = tei_tokens.first_encoder(request).description.head
    if head == "embedding":
        return await tei.tei_embed(request, checked(tei.EmbedBody, body))
    if head == "sparse_embedding":
        return await tei.tei_embed_sparse(request, checked(tei.EmbedSparseBody, body))
    return await tei.tei_predict(request, checked(tei.PredictBody, body))


class ProbabilitiesBody(EncodeBody):
    input: tei.Texts
    use_activation: bool = Field(True, description="false: logits in place of probabilities")


@router.post("/classify", summary="Probabilities of a checkpoint's own labels, in the shape of vLLM")
async def classify(request: Request, body: ProbabilitiesBody) -> Response:
    texts = [body.input] if isinstance(body.input, str) else body.input
    engine = classify_engine(request)
    way = way_of_address(request, engine, body.model)
    options = encode_options(request, body, "classify")
    found = await until_gone(request, classify_own(engine, way, texts, options))
    raise_if_all_failed(found.scored, single=isinstance(body.input, str))
    data = [_row(index, found, entry, body.use_activation) for index, entry in enumerate(found.scored)]
    usage = usage_of(found.scored)
    return envelope(request, way.model, data, usage, id=new_id("classify"), created=int(time.time()))


def _row(index: int, found: Classification, entry: Scored, use_activation: bool) -> dict[str, Any]:
    """`probs` are in the order of the checkpoint's labels."""
    if entry.error is not None:
        return {"index": index, "error": error_item(entry.error)}
    assert entry.logits is not None
    scores = found.judge(entry).scores if use_activation else entry.logits
    return {
        "index": index,
        "label": found.labels[best_first(scores)[0]],
        "probs": [float(score) for score in scores],
        "num_classes": len(found.labels),
        **truncation(entry),
    }
