"""The tasks that can be evaluated: what a line of data holds, what is asked, what an answer says, how it scores.

An entry of `KINDS` per task of the command line. Knows the endpoints' shapes, not how they are reached. Runs in the
evaluation's process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.evaluate import scoring
from service.evaluate.asking import EvaluateError
from service.evaluate.scoring import Found, Scores

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says about the requests."""

    labels: tuple[str, ...] | None = None
    head: str | None = None
    source: str | None = None
    target: str | None = None
    max_tokens: int | None = None
    unanswerable: bool = False
    truncate: bool = False
    bleu_tokenizer: str = "13a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of the data: what is asked of it and what is right. `line` counts from 1."""

    line: int
    body: dict[str, Any]
    gold: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """`read` makes of a line the request's own fields and the right answer; `find` reads an answer."""

    path: str
    fields: str
    read: Callable[[Row], tuple[dict[str, Any], Any]]
    find: Callable[[Mapping[str, Any]], Found]
    score: Callable[[Sequence[Any], Sequence[Found], Options], Scores]
    options: tuple[str, ...] = field(default=())
    """Which options become fields of its requests."""

    def item(self, line: int, row: Row, options: Options) -> Item:
        own, gold = self.read(row)
        body = {name: value for name in self.options if (value := getattr(options, name)) is not None}
        if options.truncate and self.path != "/v1/completions":
            body["truncate"] = True
        if options.unanswerable and self.path == "/v1/answer":
            body["handle_impossible_answer"] = True
        return Item(line=line, body=body | own, gold=gold)


def text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluateError(f'the field "{name}" is not a text')
    return value


def texts(row: Row, one: str, several: str) -> list[str]:
    """A field of one text, or another of several, at least one."""
    value = row.get(several, row.get(one))
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(entry, str) and entry for entry in found):
        raise EvaluateError(f'neither "{one}" nor "{several}" is a text or a list of texts')
    return found


def label(row: Row) -> str:
    value = row.get("label")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise EvaluateError('the field "label" is neither a text nor a whole number')
    return str(value)


def number(row: Row, name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise EvaluateError(f'the field "{name}" is not a number')
    return float(value)


def answers(row: Row) -> list[str]:
    """A list of texts, empty where there is no answer; also in the form of SQuAD."""
    value = row.get("answers")
    value = value.get("text") if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise EvaluateError('the field "answers" is not a list of texts')
    return value


def first(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = answer["data"][0]
    return entry


def _labelled(answer: Mapping[str, Any]) -> Found:
    entry = first(answer)
    return Found(prediction=entry["label"] or "", confidence=entry["confidence"])


def _likelihood(answer: Mapping[str, Any]) -> Found:
    values = [value for value in answer["choices"][0]["logprobs"]["token_logprobs"] if value is not None]
    return Found(prediction=(sum(values), len(values)))


def _question(row: Row) -> tuple[dict[str, Any], list[str]]:
    body = {"question": text(row, "question")}
    if row.get("context") is not None:
        body["context"] = text(row, "context")
    return body, answers(row)


KINDS: dict[str, Kind] = {
    "sentiment": Kind(
        path="/v1/sentiment",
        fields='{"text", "label"}: positive, neutral or negative',
        read=lambda row: ({"input": text(row, "text")}, label(row)),
        find=_labelled,
        score=scoring.labels,
    ),
    "classify": Kind(
        path="/v1/classify",
        fields='{"text", "label"}',
        read=lambda row: ({"input": text(row, "text")}, label(row)),
        find=_labelled,
        score=scoring.labels,
        options=("labels", "head"),
    ),
    "embeddings": Kind(
        path="/v1/similarity",
        fields='{"text_a", "text_b", "score"}: how alike they are, in any unit',
        read=lambda row: ({"pairs": [[text(row, "text_a"), text(row, "text_b")]]}, number(row, "score")),
        find=lambda answer: Found(prediction=float(first(answer)["score"])),
        score=scoring.similarities,
    ),
    "summarize": Kind(
        path="/v1/summarize",
        fields='{"document", "summary" or "summaries"}',
        read=lambda row: ({"input": text(row, "document")}, texts(row, "summary", "summaries")),
        find=lambda answer: Found(prediction=first(answer)["summary"]),
        score=scoring.summaries,
        options=("max_tokens",),
    ),
    "translate": Kind(
        path="/v1/translate",
        fields='{"source", "target" or "targets"}: the texts; languages by --source and --target',
        read=lambda row: ({"input": text(row, "source")}, texts(row, "target", "targets")),
        find=lambda answer: Found(prediction=first(answer)["translation"]),
        score=scoring.translations,
        options=("source", "target", "max_tokens"),
    ),
    "answer": Kind(
        path="/v1/answer",
        fields='{"question", "context" (optional), "answers"}: a list, empty where there is none',
        read=_question,
        find=lambda answer: Found(prediction=first(answer)["answer"] or ""),
        score=scoring.answers,
    ),
    "generate": Kind(
        path="/v1/completions",
        fields='{"text"}: scored by the likelihood that the model gives it',
        read=lambda row: (
            {"prompt": text(row, "text"), "max_tokens": 0, "echo": True, "logprobs": 0},
            len(text(row, "text").encode()),
        ),
        find=_likelihood,
        score=scoring.likelihoods,
    ),
}
