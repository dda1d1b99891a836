"""`/v1/tag`: labels of a text's parts, by a checkpoint or a head that classifies tokens.

HTTP only; which tokens make a part, the task knows. Runs in the API process, on the event loop.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.native import (
    MAX_ITEMS,
    FilledText,
    NativeBody,
    encode_engine,
    encode_options,
    envelope,
    error_item,
    truncation,
    usage_of,
)
from service.engine.models import LoadedModel
from service.tasks.encoding import raise_if_all_failed
from service.tasks.tagging import TASK, Aggregation, Tagged, tag, word_of

router = APIRouter(prefix="/v1", tags=["classification"])

MAX_IGNORED = 512


class TagBody(NativeBody):
    input: Annotated[
        Annotated[FilledText, Tag("text")]
        | Annotated[list[FilledText], Field(min_length=1, max_length=MAX_ITEMS), Tag("texts")],
        Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
    ]
    aggregation: Aggregation = "simple"
    """`none`: each token; `simple`: neighbours of one label; `first`, `average`, `max`: how a word's tokens agree."""
    ignore_labels: list[str] = Field(default_factory=lambda: ["O"], max_length=MAX_IGNORED)


@router.post("/tag", summary="Labels of a text's parts")
async def create_tags(request: Request, body: TagBody) -> Response:
    texts = [body.input] if isinstance(body.input, str) else body.input
    engine = encode_engine(request)
    model = engine.resolve(body.model, TASK)
    options = encode_options(request, body, TASK)
    work = tag(engine, model, texts, options, aggregation=body.aggregation, ignored=body.ignore_labels)
    tagged = await until_gone(request, work)
    encoded = [entry.encoded for entry in tagged]
    raise_if_all_failed(encoded, param="input", single=isinstance(body.input, str))
    data = [_item(index, entry, texts[index], model, body.aggregation) for index, entry in enumerate(tagged)]
    return envelope(request, model, data, usage_of(encoded))


def _item(index: int, entry: Tagged, text: str, model: LoadedModel, aggregation: Aggregation) -> dict[str, Any]:
    """`text` is the caller's own, `word` what the tokenizer makes of it."""
    if entry.encoded.error is not None:
        return {"index": index, "error": error_item(entry.encoded.error)}
    parts = [
        {
            "label": part.label,
            "score": part.score,
            "text": text[part.start : part.end],
            "word": word_of(model.tokenizer, part, aggregation),
            "start": part.start,
            "end": part.end,
        }
        for part in entry.parts
    ]
    return {"index": index, "parts": parts, **truncation([entry.encoded])}
