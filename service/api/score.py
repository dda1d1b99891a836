"""`/v1/score` and `/score`, in the shape of vLLM: how well the texts of pairs go together.

By a cross-encoder, or by the cosine of an embedding checkpoint's vectors. HTTP only. Runs in the API process.
"""

import time
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import AliasChoices, Discriminator, Field, Tag
from starlette.responses import Response

from service.api.embeddings import pair_item, raise_if_no_pair_is_left
from service.api.event_stream import until_gone
from service.api.generating import new_id
from service.api.native import (
    MAX_ITEMS,
    EncodeBody,
    FilledText,
    encode_engine,
    encode_options,
    envelope,
    usage_of,
)
from service.errors import InvalidRequest
from service.tasks.embeddings import Scale, pair_similarities, prompt_of

router = APIRouter(tags=["embeddings"])

Texts = Annotated[
    Annotated[FilledText, Tag("text")]
    | Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]


class ScoreBody(EncodeBody):
    """One text against one or all of the others, or two lists of one length, pair by pair."""

    text_1: Texts = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"), description="or `queries`")
    text_2: Texts = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2"), description="or `documents`"
    )
    use_activation: bool = Field(True, description="false: a cross-encoder's logits, without its activation")


@router.post("/score", summary="The same as /v1/score")
@router.post("/v1/score", summary="How well texts go together, in the shape of vLLM")
async def create_score(request: Request, body: ScoreBody) -> Response:
    pairs = _pairs(body.text_1, body.text_2)
    engine = encode_engine(request)
    model = engine.resolve(body.model, "similarity")
    prompt = prompt_of(model, prompt_name=None, input_type=None)
    options = encode_options(request, body, "similarity")
    scale: Scale = "own" if body.use_activation else "logit"
    work = pair_similarities(engine, model, pairs, options, prompt=prompt, scale=scale, measure="cosine")
    scored, read = await until_gone(request, work)
    raise_if_no_pair_is_left(scored, (_first_place("text_1", body.text_1), _first_place("text_2", body.text_2)))
    data = [{"object": "score", **pair_item(index, pair)} for index, pair in enumerate(scored)]
    return envelope(request, model, data, usage_of(read), id=new_id("score"), created=int(time.time()))


def _first_place(name: str, texts: str | list[str]) -> str:
    return name if isinstance(texts, str) else f"{name}.0"


def _pairs(first: str | list[str], second: str | list[str]) -> list[tuple[str, str]]:
    left = [first] if isinstance(first, str) else first
    right = [second] if isinstance(second, str) else second
    if len(left) not in (1, len(right)):
        message = f"text_1 has {len(left):,} texts and text_2 {len(right):,}: give one text_1, or as many of both"
        raise InvalidRequest(message, param="text_1")
    return list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))
