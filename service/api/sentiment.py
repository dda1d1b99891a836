"""`/v1/sentiment`: positive, neutral or negative, and how much so.

HTTP only; what a checkpoint's labels say about sentiment, the task knows. Runs in the API process, on the event loop.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api.classify import certainty, classify_engine, raise_if_all_failed, truncation
from service.api.event_stream import until_gone
from service.api.native import MAX_ITEMS, InputText, NativeBody, encode_options, envelope, error_item, usage_of
from service.tasks.classification import Classification
from service.tasks.confidence import Scored
from service.tasks.sentiment import CLASSES, SentimentWay, choose, classify_sentiment, sentiment_of

router = APIRouter(prefix="/v1", tags=["classification"])

Texts = Annotated[
    Annotated[InputText, Tag("text")]
    | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]


class SentimentBody(NativeBody):
    input: Texts
    abstain_below: float | None = Field(None, ge=0, le=1, description="no label where confidence is less")


@router.post("/sentiment", summary="Positive, neutral or negative")
async def create_sentiment(request: Request, body: SentimentBody) -> Response:
    texts = [body.input] if isinstance(body.input, str) else body.input
    engine = classify_engine(request)
    chosen = choose(engine, body.model)
    options = encode_options(request, body, "sentiment")
    found = await until_gone(request, classify_sentiment(engine, chosen, texts, options))
    raise_if_all_failed(found.scored, single=isinstance(body.input, str))
    data = [_item(index, found, entry, chosen, body) for index, entry in enumerate(found.scored)]
    return envelope(request, chosen.way.model, data, usage_of(found.scored), method=chosen.way.method)


def _item(
    index: int, found: Classification, entry: Scored, chosen: SentimentWay, body: SentimentBody
) -> dict[str, Any]:
    if entry.error is not None:
        return {"index": index, "error": error_item(entry.error)}
    sentiment = sentiment_of(found, entry, chosen.valences)
    judgement = sentiment.judgement
    best = judgement.order[0]
    certain = certainty(judgement, found.calibrated, body.abstain_below)
    return {
        "index": index,
        "label": None if certain["abstained"] else CLASSES[best],
        "score": float(judgement.scores[best]),
        "scores": {name: float(score) for name, score in zip(CLASSES, judgement.scores, strict=True)},
        "polarity": sentiment.polarity,
        **certain,
        **truncation(entry),
    }
