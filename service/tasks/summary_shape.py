"""What a summary is and how it shall look: free text, so many sentences, a list, a line.

Knows no model, no engine and no HTTP. Runs in the API process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from service.tasks.instructing import Spent
from service.tasks.sentences import split_sentences

Style = Literal["paragraph", "bullets", "line"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a summary shall look."""

    style: Style = "paragraph"
    max_sentences: int | None = None

    @property
    def is_free(self) -> bool:
        """Whether it is the checkpoint's own business."""
        return self.style == "paragraph" and self.max_sentences is None


@dataclass(slots=True, kw_only=True)
class Sentence:
    """One of a text's own, with its place in it and its salience."""

    text: str
    start: int
    end: int
    score: float


@dataclass(slots=True, kw_only=True)
class Summary:
    text: str = ""
    finish_reason: str = "stop"
    num_pieces: int = 1
    sentences: list[Sentence] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)


def shaped(text: str, shape: Shape) -> str:
    """The text's first sentences, as many as are wanted, in the form that is wanted."""
    if shape.is_free:
        return text
    spans = split_sentences(text)
    limit = shape.max_sentences if shape.style != "line" else 1
    spans = spans[:limit]
    if not spans:
        return ""
    if shape.style == "paragraph":
        return text[spans[0].start : spans[-1].end]
    return joined([text[span.start : span.end] for span in spans], shape.style)


def joined(sentences: Sequence[str], style: Style) -> str:
    lines = [" ".join(sentence.split()) for sentence in sentences]
    if style == "bullets":
        return "\n".join(f"- {line.removeprefix('- ')}" for line in lines)
    return " ".join(lines)
