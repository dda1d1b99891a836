"""Answers as spans of a context, from the start and end logits of its tokens, as the pipeline of 4.57.6 reads them.

Cuts question and context into windows that overlap, and turns each window's logits into answers: softmax within the
window, products of start and end, whole words, equal answers taken together. Knows no engine and no HTTP; the formulas
are those of `transformers`' `question_answering.py`. Runs in the API process.

Legend: T tokens of a window, A tokens of the longest answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer, TokenizerError
from service.engine.protocol import EncodeInput
from service.errors import ContextLengthExceeded, InvalidRequest, ServiceError

MAX_SEQUENCE = 384
MAX_STRIDE = 128
MASKED = -10000.0
MAX_READINGS = 32
"""So many times what is sent may be read, in windows that overlap; by the pipeline's own stride it is less than 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanOptions:
    """What a request says about its answers, by the pipeline's names and with its defaults."""

    top_k: int = 1
    max_answer_len: int = 15
    """In tokens."""
    max_seq_len: int | None = None
    doc_stride: int | None = None
    """How many tokens two neighbouring windows share."""
    handle_impossible_answer: bool = False
    align_to_words: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of the context behind the question. `offsets` and `words` are those of the context's tokens alone."""

    input: EncodeInput
    first: int
    """Where the context's tokens begin among the window's."""
    offsets: Sequence[tuple[int, int]]
    words: Sequence[int | None]
    cls_places: Sequence[int] = ()


@dataclass(slots=True, kw_only=True)
class SpanAnswer:
    """`score` is a probability within a window; an answer found several times has the sum, which may be above 1."""

    text: str
    start: int
    end: int
    score: float


@dataclass(slots=True)
class WindowAnswers:
    """What the windows of one question have given so far."""

    answers: list[SpanAnswer] = field(default_factory=list)
    null_score: float = 1_000_000.0
    by_text: dict[str, SpanAnswer] = field(default_factory=dict)


def cut_windows(
    tokenizer: Tokenizer, question: str, context: str, options: SpanOptions, *, limit: int, lowercase: bool = False
) -> list[Window]:
    """Windows over the whole context, none of more than `limit` tokens.

    Worked example: a context of 10 tokens, room for 6 behind the question, a stride of 2: tokens 0-5, 4-9.

    Raises: InvalidRequest, ContextLengthExceeded, naming the field at fault.
    """
    if lowercase:
        question, context = question.lower(), _lowered(context)
    try:
        found = tokenizer.backend.encode(question, context)
    except TypeError as error:
        raise InvalidRequest(str(TokenizerError("not valid Unicode (lone surrogates)")), param="context") from error
    # Each of these is made anew whenever it is asked for.
    ids, type_ids, offsets, words, owners = (
        found.ids, found.type_ids, found.offsets, found.word_ids, found.sequence_ids
    )  # fmt: skip
    length = limit if options.max_seq_len is None else min(options.max_seq_len, limit)
    places = [place for place, owner in enumerate(owners) if owner == 1]
    if not places:
        raise InvalidRequest("the context has no tokens", param="context")
    first, end = places[0], places[-1] + 1
    room = length - (len(ids) - len(places))
    if room < 1:
        message = f"the question takes {len(ids) - len(places):,} tokens; a window has {length:,}"
        raise ContextLengthExceeded(message, param="question")
    step = room - _stride(options, length, room)
    _check_reading(options, num_windows=1 + max(0, -(-(end - first - room) // step)), length=length, whole=len(ids))
    cls_id = tokenizer.token_id(tokenizer.special_tokens.get("cls_token", ""))
    windows = []
    for start in range(first, end, step):
        stop = min(start + room, end)
        kept = [slice(first), slice(start, stop), slice(end, None)]
        own_ids = [id for part in kept for id in ids[part]]
        own_types = [id for part in kept for id in type_ids[part]]
        windows.append(
            Window(
                input=EncodeInput(ids=own_ids, type_ids=own_types if any(own_types) else []),
                first=first,
                offsets=offsets[start:stop],
                words=words[start:stop],
                cls_places=[place for place, id in enumerate(own_ids) if id == cls_id],
            )
        )
        if stop == end:
            break
    return windows


def _lowered(text: str) -> str:
    """In lower case, each character by one, so that offsets hold."""
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)


def _stride(options: SpanOptions, length: int, room: int) -> int:
    if options.doc_stride is None:
        return min(length // 2, MAX_STRIDE, room // 2)
    if options.doc_stride >= room:
        message = f"doc_stride is {options.doc_stride:,}; a window has room for {room:,} tokens of the context"
        raise InvalidRequest(message, param="doc_stride")
    return options.doc_stride


def _check_reading(options: SpanOptions, *, num_windows: int, length: int, whole: int) -> None:
    """Windows that share nearly all of their tokens, or that are nearly all question, would be read without end."""
    limit = MAX_READINGS * whole
    if num_windows > MAX_READINGS and num_windows * length > limit:
        message = (
            f"{num_windows:,} windows of {length:,} tokens are needed, {num_windows * length:,} in all; question and "
            f"context have {whole:,}, and are read {MAX_READINGS} times at most, which makes {limit:,}"
        )
        raise InvalidRequest(message, param="question" if options.doc_stride is None else "doc_stride")


def add_window(
    found: WindowAnswers, window: Window, logits: NDArray[np.float32], context: str, options: SpanOptions
) -> None:
    """Adds what one window says: `logits` [T, 2] of starts and ends."""
    num_context = len(window.offsets)
    inside = slice(window.first, window.first + num_context)
    masked = np.full_like(logits, MASKED)
    masked[inside] = logits[inside]
    cls = list(window.cls_places)
    masked[cls] = logits[cls]  # some checkpoints say with it that there is no answer
    powers = np.exp(masked - masked.max(axis=0))
    shares = powers / powers.sum(axis=0)
    if options.handle_impossible_answer:
        found.null_score = min(found.null_score, float(shares[0, 0] * shares[0, 1]))
    count = options.top_k * 2 + 10 if options.align_to_words else options.top_k
    for start, end, score in _best_spans(shares[inside], count, options.max_answer_len):
        first, last = _characters(window, start, end, options.align_to_words)
        text = context[first:last]
        known = found.by_text.get(text.lower())
        if known is not None:
            known.score += score
            continue
        answer = SpanAnswer(text=text, start=first, end=last, score=score)
        found.by_text[text.lower()] = answer
        found.answers.append(answer)


def _best_spans(shares: NDArray[np.float32], count: int, max_length: int) -> list[tuple[int, int, float]]:
    """The likeliest (first token, last token, score) of spans of at most `max_length` tokens, best first."""
    num_tokens = len(shares)
    width = min(max_length, num_tokens)
    ends = np.zeros(num_tokens + width, dtype=np.float32)
    ends[:num_tokens] = shares[:, 1]
    # candidates[s, k]: from token s to token s + k  # [T, A]
    candidates = shares[:, :1] * np.lib.stride_tricks.sliding_window_view(ends, width)[:num_tokens]
    flat = candidates.ravel()
    # Only what is as likely as the last that is wanted is put in order: all of it would take a second.
    least = np.partition(flat, -count)[-count] if count < len(flat) else 0.0
    likely = np.flatnonzero((flat >= least) & (flat > 0))
    order = likely[np.argsort(-flat[likely], kind="stable")[:count]]
    return [(int(at // width), int(at // width + at % width), float(flat[at])) for at in order]


def _characters(window: Window, start: int, end: int, whole_words: bool) -> tuple[int, int]:
    """The characters of tokens `start` to `end`, grown to whole words as far as the window shows them."""
    if whole_words and window.words[start] is not None and window.words[end] is not None:
        while start > 0 and window.words[start - 1] == window.words[start]:
            start -= 1
        while end + 1 < len(window.words) and window.words[end + 1] == window.words[end]:
            end += 1
    return window.offsets[start][0], window.offsets[end][1]


def best_answers(found: WindowAnswers, options: SpanOptions) -> list[SpanAnswer]:
    """The `top_k` best over all windows; an empty one stands for "the context does not say"."""
    answers = list(found.answers)
    if options.handle_impossible_answer:
        answers.append(SpanAnswer(text="", start=0, end=0, score=found.null_score))
    if not answers:
        raise ServiceError("no span of the context has a probability above 0")
    answers.sort(key=lambda answer: -answer.score)
    return answers[: options.top_k]
