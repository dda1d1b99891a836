"""`/v1/translate`: texts in another language.

HTTP only; which checkpoint knows which languages, the tasks know. Runs in the API process, on the event loop.
"""

from functools import partial
from typing import Annotated, Any, cast

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.api.event_stream import until_gone
from service.api.native import envelope
from service.api.schemas_openai import INT32
from service.api.state import request_state
from service.api.writing import (
    Opening,
    Texts,
    WritingBody,
    choices_of,
    fault_item,
    one_alone,
    raise_if_all_failed,
    settled,
    stream_text,
    truncation,
    usage_of,
    writing_options,
)
from service.errors import ServiceError
from service.tasks.instructing import Commission, Spent, Writer, side_by_side
from service.tasks.long_translations import Translated, Translator
from service.tasks.translation import TASK, TranslationEngine, choose

router = APIRouter(prefix="/v1", tags=["translation"])

Language = Annotated[str, Field(min_length=1, max_length=64)]


class TranslateBody(WritingBody):
    """Languages are BCP-47 tags or the checkpoint's own codes; what a checkpoint has only one of can be left out.

    What is longer than the context is translated piece by piece, and `max_tokens` is then each piece's; with `truncate`
    only what fits is read.
    """

    input: Texts
    source: Language | None = None
    target: Language | None = None
    top_k: int | None = Field(None, ge=0, le=INT32, description="of sampling; 0: off")


@router.post("/translate", summary="A text in another language")
async def create_translation(request: Request, body: TranslateBody) -> Response:
    engine = cast(TranslationEngine, request_state(request).engine)
    chosen = choose(engine, body.model, body.source, body.target)
    commission = Commission(
        model=chosen.model, assignment=chosen.assignment, choices=choices_of(body, sampled_top_k=body.top_k)
    )
    writer = Writer(engine, writing_options(request, body, TASK))
    translator = Translator(writer, commission, chosen.target)
    languages = {"source": chosen.source, "target": chosen.target}
    if body.stream:
        text = one_alone(body.input)

        async def begin() -> Opening:
            pieces = await translator.cut(text, truncate=body.truncate)
            head = {"object": "translation.chunk", **languages, "pieces": len(pieces.prompts)}
            return Opening(text=translator.start(pieces), head=head)

        return stream_text(request, chosen.model, begin)
    texts = [body.input] if isinstance(body.input, str) else body.input
    works = [partial(_outcome, translator, text, body.truncate) for text in texts]
    outcomes = await until_gone(request, side_by_side(works))
    raise_if_all_failed(outcomes, param="input", single=isinstance(body.input, str))
    data = [_item(index, outcome) for index, outcome in enumerate(outcomes)]
    spent = Spent.total(outcome.spent for outcome in outcomes if isinstance(outcome, Translated))
    return envelope(request, chosen.model, data, usage_of(spent), **languages)


async def _outcome(translator: Translator, text: str, truncate: bool) -> Translated | ServiceError:
    return await settled(translator.translate(text, truncate=truncate))


def _item(index: int, outcome: Translated | ServiceError) -> dict[str, Any]:
    if isinstance(outcome, ServiceError):
        return fault_item(index, outcome)
    item = {"index": index, "translation": outcome.text, "finish_reason": outcome.finish_reason}
    if outcome.num_pieces > 1:
        item["pieces"] = outcome.num_pieces
    return item | truncation(outcome.spent)
