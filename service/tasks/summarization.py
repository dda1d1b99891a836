"""Summaries: which checkpoint makes them and how, and those that a generating checkpoint writes.

A text longer than the context is summarized piece by piece, and then the pieces' summaries. What is made of a text's
own sentences is in `extractive_summaries`. Knows neither HTTP nor torch. Runs in the API process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

from model.description import CheckpointDescription
from service.engine.models import LoadedModel, ModelDirectory
from service.errors import ContextLengthExceeded, ModelNotFound, TaskNotSupported
from service.tasks.encoding import EncodeEngine
from service.tasks.generation import GenerationEngine, Prompt
from service.tasks.instructing import TEXT, Assignment, Commission, Spent, Writer, side_by_side
from service.tasks.map_reduce import map_reduce
from service.tasks.pieces import fitting_pieces
from service.tasks.serial_text import SerialText
from service.tasks.summary_shape import Shape, Style, Summary, shaped

Method = Literal["abstractive", "extractive"]

TASK = "summarize"
SHAPES: Mapping[Style, str] = {
    "paragraph": "in one paragraph",
    "bullets": 'as a list in which each point is a line that begins with "- "',
    "line": "in one sentence",
}


class SummaryEngine(EncodeEngine, GenerationEngine, Protocol):
    @property
    def models(self) -> ModelDirectory: ...

    def resolve(self, name: str | None, task: str) -> LoadedModel: ...


def choose(engine: SummaryEngine, name: str | None, method: Literal["auto"] | Method) -> tuple[LoadedModel, Method]:
    """The checkpoint and the way: best one that was made to summarize, then one that follows instructions.

    Raises: ModelNotFound, TaskNotSupported that says what could.
    """
    if name is not None:
        model = engine.resolve(name, TASK)
        own = _method(model.description)
        if method != "auto" and method != own:
            able = [other.name for other in _able(engine, method)]
            others = f"; {method} summaries are made by: {', '.join(able)}" if able else ""
            raise TaskNotSupported(f"model '{model.name}' makes {own} summaries alone{others}", param="model")
        return model, own
    abstractive = _able(engine, "abstractive")
    extractive = _able(engine, "extractive")
    if method == "auto":
        # A plain or small LM goes on with a form well or badly: sentences of the text itself are a safer summary.
        fit = [model for model in abstractive if _writes_by_training(model)]
        found = [*fit, *extractive, *abstractive]
    else:
        found = abstractive if method == "abstractive" else extractive
    if not found:
        kind = "" if method == "auto" else f"{method} "
        raise ModelNotFound(f"no loaded checkpoint makes {kind}summaries", param="model")
    return found[0], _method(found[0].description)


def _able(engine: SummaryEngine, method: Method) -> list[LoadedModel]:
    able = [model for model in engine.models.offered() if TASK in model.tasks and _method(model.description) == method]
    able.sort(key=lambda model: (model.description.network != "encoder_decoder", model.chat_template is None))
    return able


def _method(description: CheckpointDescription) -> Method:
    return "extractive" if description.head == "embedding" else "abstractive"


def _writes_by_training(model: LoadedModel) -> bool:
    description = model.description
    return description.network == "encoder_decoder" or (model.chat_template is not None and not description.small)


def assignment(shape: Shape) -> Assignment:
    limit = "" if shape.max_sentences is None or shape.style == "line" else f", of at most {shape.max_sentences}"
    unit = "" if not limit else (" points" if shape.style == "bullets" else " sentences")
    return Assignment(
        instruction=(
            f"Summarize the following text {SHAPES[shape.style]}{limit}{unit}, in the text's own language. Answer with "
            f"the summary alone.\n\n{TEXT}"
        ),
        form=f"Text: {TEXT}\n\nA short summary of the text above:",
        declared_task="summarization",
    )


class Summarizer:
    """Has texts summarized by one checkpoint."""

    def __init__(self, writer: Writer, commission: Commission, shape: Shape) -> None:
        self._writer = writer
        self._commission = commission
        self._shape = shape

    async def summarize(self, text: str, *, truncate: bool) -> Summary:
        """`truncate`: what does not fit is left out and counted, in place of reading it piece by piece."""
        prompt, summary = await self.begin(text, truncate=truncate)
        written = await self._writer.write(self._commission.model, prompt)
        summary.text = shaped(written.texts[0], self._shape)
        summary.finish_reason = written.finish_reasons[0]
        summary.spent = Spent.total([summary.spent, written.spent])
        return summary

    async def begin(self, text: str, *, truncate: bool) -> tuple[Prompt, Summary]:
        """The prompt whose answer is the summary, and a summary without text: what it took to come so far."""
        summary = Summary()
        if truncate:
            return await self._commission.prompt(text, truncate=True), summary
        try:
            return await self._commission.prompt(text), summary
        except ContextLengthExceeded:
            room = await self._commission.room()
        digest = await map_reduce(text, partial(self._cut, room), partial(self._shorten, summary.spent, room))
        summary.num_pieces = digest.num_pieces
        return await self._commission.prompt(digest.text), summary

    def start(self, prompt: Prompt) -> SerialText:
        """The summary under way, to be closed by the caller."""
        return SerialText(self._writer, self._commission.model, [prompt])

    async def _cut(self, room: int, text: str) -> list[str]:
        return [text[span.start : span.end] for span in await fitting_pieces(self._commission, text, room)]

    async def _shorten(self, spent: Spent, room: int, pieces: Sequence[str]) -> list[str]:
        """Each piece's summary, of a third of the room at most, so that three of them are one piece again."""
        model = self._commission.model
        choices = self._commission.choices
        most = max(1, min(self._commission.max_tokens, room // 3))
        commission = replace(
            self._commission,
            assignment=assignment(Shape()),
            choices=replace(choices, max_tokens=most, min_tokens=None),
        )

        async def shorten(piece: str) -> str:
            written = await self._writer.write(model, await commission.prompt(piece))
            spent.add(written.spent.as_piece())
            return written.texts[0].strip()

        return await side_by_side([partial(shorten, piece) for piece in pieces])
