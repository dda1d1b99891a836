"""Answers to questions: taken from a context by a checkpoint that reads, or written by one that generates.

Reading is by a question-answering checkpoint or by an encoder's span head; all windows of all questions go to the
engine in one call. Written answers can be asked for several times and put to the vote. Knows neither HTTP nor torch.
Runs in the API process.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from model.description import CheckpointDescription
from service.engine.models import LoadedModel, ModelDirectory
from service.errors import ModelNotFound, ServiceError, TaskNotSupported
from service.tasks.encoding import EncodedText, EncodeEngine, EncodeOptions, max_input_tokens, run_texts
from service.tasks.generation import GenerationEngine, Prompt
from service.tasks.instructing import TEXT, Assignment, Commission, Spent, Writer
from service.tasks.span_answers import (
    MAX_SEQUENCE,
    SpanAnswer,
    SpanOptions,
    Window,
    WindowAnswers,
    add_window,
    best_answers,
    cut_windows,
)
from service.tasks.voting import Ballot, vote

Method = Literal["extractive", "generative"]

TASK = "answer"
INLINE_CHARS = 4_000
"""More text than this is cut into windows in a thread."""
INLINE_CANDIDATES = 100_000
"""More spans than this are weighed in a thread: about a millisecond of work."""
MAX_ANSWER_TOKENS = 128
SAMPLED_TEMPERATURE = 0.7
"""Of samples that are put to the vote, where the request does not say (arXiv:2203.11171)."""


class AnswerEngine(EncodeEngine, GenerationEngine, Protocol):
    @property
    def models(self) -> ModelDirectory: ...

    def resolve(self, name: str | None, task: str) -> LoadedModel: ...


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    context: str | None = None


@dataclass(slots=True, kw_only=True)
class Read:
    """What a context says to a question: the best answers, or the question's own fault."""

    answers: list[SpanAnswer] = field(default_factory=list)
    num_windows: int = 0
    num_tokens: int = 0
    error: ServiceError | None = None


@dataclass(slots=True, kw_only=True)
class WrittenAnswer:
    """`ballot` where there were several samples."""

    text: str
    finish_reason: str
    ballot: Ballot | None
    spent: Spent


def choose(
    engine: AnswerEngine, name: str | None, method: Literal["auto"] | Method, *, prefers: Method
) -> tuple[LoadedModel, Method]:
    """The checkpoint and the way; `prefers` says which, where both are there and the request leaves it open.

    Raises: ModelNotFound, TaskNotSupported that says what could.
    """
    if name is not None:
        model = engine.resolve(name, TASK)
        own = _method(model.description)
        if method != "auto" and method != own:
            able = [other.name for other in _able(engine, method)]
            others = f"; {method} answers are given by: {', '.join(able)}" if able else ""
            raise TaskNotSupported(f"model '{model.name}' gives {own} answers alone{others}", param="model")
        return model, own
    first = prefers if method == "auto" else method
    able_models = _able(engine, first)
    if method == "auto" and not able_models:
        able_models = _able(engine, "extractive" if first == "generative" else "generative")
    if not able_models:
        kind = "questions" if method == "auto" else f"questions by {method} answers"
        raise ModelNotFound(f"no loaded checkpoint can answer {kind}", param="model")
    return able_models[0], _method(able_models[0].description)


def _able(engine: AnswerEngine, method: Method) -> list[LoadedModel]:
    """A checkpoint made for questions before a head of many, one with a chat template before one without."""
    able = [model for model in engine.models.offered() if TASK in model.tasks and _method(model.description) == method]
    able.sort(key=lambda model: (model.description.head != "question_answering", model.chat_template is None))
    return able


def _method(description: CheckpointDescription) -> Method:
    return "generative" if description.head == "language_model" else "extractive"


# -- read from the context --------------------------------------------------------------------------------------------


async def read_answers(
    engine: EncodeEngine,
    model: LoadedModel,
    questions: Sequence[Question],
    options: EncodeOptions,
    spans: SpanOptions,
) -> list[Read]:
    """For each question the best spans of its context, with the scores of the question-answering pipeline."""
    head, limit = _span_head(model.description, max_input_tokens(model))
    num_chars = sum(len(question.text) + len(question.context or "") for question in questions)
    if num_chars > INLINE_CHARS:
        cut = await asyncio.to_thread(_cut_all, model, questions, spans, limit)
    else:
        cut = _cut_all(model, questions, spans, limit)
    everything = [text for windows in cut if not isinstance(windows, ServiceError) for _, text in windows]
    await run_texts(engine, model, everything, "span_logits", options, head=head)
    num_candidates = sum(text.num_tokens for text in everything) * spans.max_answer_len
    if num_candidates > INLINE_CANDIDATES:
        return await asyncio.to_thread(_read_all, questions, cut, spans)
    return _read_all(questions, cut, spans)


def _span_head(description: CheckpointDescription, longest: int) -> tuple[str, int]:
    """The head that is asked ("": the checkpoint's own), and how many tokens a window may have."""
    if description.head == "question_answering":
        return "", min(longest, MAX_SEQUENCE)
    name, config = next((name, config) for name, config in description.heads.items() if config.kind == "span")
    return name, min(longest, MAX_SEQUENCE, config.max_length or MAX_SEQUENCE)


Windows = list[tuple[Window, EncodedText]]


def _cut_all(
    model: LoadedModel, questions: Sequence[Question], spans: SpanOptions, limit: int
) -> list[Windows | ServiceError]:
    embedding = model.description.embedding
    lowercase = embedding is not None and embedding.lowercase
    longest = max_input_tokens(model) if spans.max_seq_len is not None else limit
    found: list[Windows | ServiceError] = []
    for question in questions:
        try:
            windows = cut_windows(
                model.tokenizer, question.text, question.context or "", spans, limit=longest, lowercase=lowercase
            )
            found.append([(window, EncodedText(input=window.input)) for window in windows])
        except ServiceError as error:
            found.append(error)
    return found


def _read_all(questions: Sequence[Question], cut: Sequence[Windows | ServiceError], spans: SpanOptions) -> list[Read]:
    return [_read(question, windows, spans) for question, windows in zip(questions, cut, strict=True)]


def _read(question: Question, windows: Windows | ServiceError, spans: SpanOptions) -> Read:
    if isinstance(windows, ServiceError):
        return Read(error=windows)
    read = Read(num_windows=len(windows), num_tokens=sum(text.num_tokens for _, text in windows))
    found = WindowAnswers()
    for window, text in windows:
        if text.error is not None:
            read.error = text.error
            return read
        assert text.values is not None
        add_window(found, window, text.values, question.context or "", spans)
    read.answers = best_answers(found, spans)
    return read


# -- written ----------------------------------------------------------------------------------------------------------


def assignment(question: Question) -> Assignment:
    """The question put to a generating checkpoint; where there is a context, that is the text which may be cut."""
    if question.context is None:
        return Assignment(
            instruction=f"Answer the question briefly. Answer with the answer alone.\n\nQuestion: {TEXT}",
            form=f"Question: {TEXT}\nAnswer:",
            max_tokens=MAX_ANSWER_TOKENS,
        )
    asked = question.text.replace(TEXT, TEXT[1:-1])
    return Assignment(
        instruction=(
            "Answer the question by the text alone, briefly and in its words where that is possible. Answer with the "
            f"answer alone; if the text does not say, answer: unknown.\n\nText: {TEXT}\n\nQuestion: {asked}"
        ),
        form=f"Text: {TEXT}\n\nQuestion: {asked}\nAnswer:",
        source=f"question: {asked} context: {TEXT}",
        max_tokens=MAX_ANSWER_TOKENS,
    )


async def answer_prompt(commission: Commission, question: Question, *, truncate: bool) -> Prompt:
    """Raises: InvalidRequest (ContextLengthExceeded among them), naming the field at fault."""
    if question.context is None:
        return await commission.prompt(question.text, param="question")
    return await commission.prompt(question.context, truncate=truncate, param="context")


async def write_answer(
    writer: Writer, commission: Commission, question: Question, *, truncate: bool, samples: int
) -> WrittenAnswer:
    """One answer; of several samples the one that most of them give, whatever their case, articles and punctuation."""
    prompt = await answer_prompt(commission, question, truncate=truncate)
    written = await writer.write(commission.model, prompt, n=samples)
    if samples == 1:
        return WrittenAnswer(
            text=written.texts[0], finish_reason=written.finish_reasons[0], ballot=None, spent=written.spent
        )
    ballot = vote([text or None for text in written.texts])
    winner = ballot.winner or ""
    place = written.texts.index(winner) if winner in written.texts else 0
    return WrittenAnswer(text=winner, finish_reason=written.finish_reasons[place], ballot=ballot, spent=written.spent)
