"""Texts and pairs as the token ids of one pass, truncated only where that was asked for, and then said so.

Shared by every task that reads texts whole: embeddings, classification, rerank, zero-shot. Tokenizes in a thread when
there is much to do. Knows neither HTTP nor what the network answers. Runs in the API process.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Encoding, TokenizerError
from service.engine.flight import EncodeRequest
from service.engine.models import LoadedModel
from service.engine.protocol import EncodeInput, EncodeOutput, EncodeResult
from service.errors import ContextLengthExceeded, GenerationFailed, InvalidRequest, ServiceError
from service.tasks.templated import encode_templated

INLINE_CHARS = 4_000
"""More text than this is tokenized in a thread."""
PIECE_CHARS = 250_000
"""Of several texts so much is tokenized at once: what a tokenizer says of a token takes some 500 bytes."""

Text = str | tuple[str, str]
Side = Literal["first", "second", "longest"]
Truncation = bool | Literal["start"]
"""Whether what is too long is cut: at its end, or at its start."""


class EncodeEngine(Protocol):
    def resolve(self, name: str | None, task: str) -> LoadedModel: ...

    async def encode(self, request: EncodeRequest) -> list[EncodeResult]: ...


class EncodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all texts of a request. `deadline` is in `time.monotonic()` seconds."""

    task: str
    truncate: Truncation = False
    max_tokens: int | None = None
    """The most that a text or pair may have, special tokens included, where the caller allows less than there is."""
    max_part_tokens: int | None = None
    """The most that the text which gives way may have by itself, without special tokens: of a pair, one side."""
    client: str = ""
    priority: int = 0
    deadline: float | None = None

    def room(self, *, side: Side = "longest", max_tokens: int | None = None) -> "Room":
        """`max_tokens` is a further limit, of the task."""
        if max_tokens is None or (self.max_tokens is not None and self.max_tokens < max_tokens):
            max_tokens = self.max_tokens
        return Room(truncate=self.truncate, side=side, max_tokens=max_tokens, max_part_tokens=self.max_part_tokens)


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a text is read, and what of it gives way: the limits are those of `EncodeOptions`."""

    truncate: Truncation = False
    side: Side = "longest"
    max_tokens: int | None = None
    max_part_tokens: int | None = None

    def excess(self, encoding: Encoding, limit: int) -> int:
        """How many tokens are too many; not above nought where all fits."""
        excess = len(encoding.ids) - limit
        if self.max_part_tokens is None:
            return excess
        return max(excess, encoding.sequence_ids.count(1 if self.side == "second" else 0) - self.max_part_tokens)


WHOLE = Room()


@dataclass(slots=True, kw_only=True)
class EncodedText:
    """One text's way through the network: its ids, how many did not fit, and its outcome."""

    input: EncodeInput
    num_truncated: int = 0
    values: NDArray[np.float32] | None = None
    tokenized: float | None = None
    """When its ids were there, in `time.monotonic()` seconds."""
    started: float | None = None
    """When its request's first step began, in `time.monotonic()` seconds."""
    error: ServiceError | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input.ids)


def max_input_tokens(model: LoadedModel) -> int:
    """The longest text with its special tokens: the network's positions, or less where the checkpoint says so."""
    embedding = model.description.embedding
    limit = model.description.context_length
    return limit if embedding is None or embedding.max_length is None else min(limit, embedding.max_length)


async def tokenize(
    model: LoadedModel,
    texts: Sequence[Text],
    *,
    room: Room = WHOLE,
    prompt: str = "",
) -> list[EncodedText]:
    """Each text's ids; one that cannot be read whole and may not be truncated carries its error.

    `prompt` is put before each text (of a pair: before the first), or told to the chat template that the texts go
    through, as sentence-transformers does.
    """
    if sum(map(_num_chars, texts)) > INLINE_CHARS:
        encoded = await asyncio.to_thread(_tokenize, model, texts, room, prompt)
    else:
        encoded = _tokenize(model, texts, room, prompt)
    now = time.monotonic()
    for text in encoded:
        text.tokenized = now
    return encoded


def _tokenize(model: LoadedModel, texts: Sequence[Text], room: Room, prompt: str) -> list[EncodedText]:
    return [text for piece in _pieces(texts) for text in _tokenize_at_once(model, piece, room, prompt)]


def _pieces(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """Consecutive texts, of `PIECE_CHARS` together or each alone."""
    first = num_chars = 0
    for place, text in enumerate(texts):
        num_chars += _num_chars(text)
        if num_chars > PIECE_CHARS and place > first:
            yield texts[first:place]
            first, num_chars = place, _num_chars(text)
    yield texts[first:]


def _num_chars(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _tokenize_at_once(model: LoadedModel, texts: Sequence[Text], room: Room, prompt: str) -> list[EncodedText]:
    embedding = model.description.embedding
    limit = max_input_tokens(model) if room.max_tokens is None else min(room.max_tokens, max_input_tokens(model))
    if embedding is not None and embedding.messages is not None:
        free = limit if room.max_part_tokens is None else 0  # whose a token is matters from here on
        templated = encode_templated(model, embedding.messages, texts, prompt, limit=free)
        return [_fit(encoding, limit, room, 0) for encoding in templated]
    lower = embedding is not None and embedding.lowercase
    prepared = [_prepared(text, prompt, lower) for text in texts]
    skip = 0
    if prompt and embedding is not None and not embedding.include_prompt:
        ids = model.tokenizer.encode(prompt)
        # The prompt's own closing token, where the tokenizer adds one, is not there in a text that goes on.
        skip = len(ids) - (bool(ids) and model.tokenizer.is_special(ids[-1]))
    try:
        encodings: list[Encoding | ServiceError] = [*model.tokenizer.encode_batch(prepared, with_offsets=False)]
    except TokenizerError:
        encodings = [_encode_one(model, text) for text in prepared]
    return [_fit(encoding, limit, room, skip) for encoding in encodings]


def _prepared(text: Text, prompt: str, lower: bool) -> Text:
    if isinstance(text, str):
        text = prompt + text
        return text.lower() if lower else text
    first, second = prompt + text[0], text[1]
    return (first.lower(), second.lower()) if lower else (first, second)


def _encode_one(model: LoadedModel, text: Text) -> Encoding | ServiceError:
    try:
        return model.tokenizer.encode_batch([text], with_offsets=False)[0]
    except TokenizerError as error:
        return InvalidRequest(str(error))


def _fit(encoding: Encoding | ServiceError, limit: int, room: Room, skip: int) -> EncodedText:
    if isinstance(encoding, ServiceError):
        return EncodedText(input=EncodeInput(ids=[]), error=encoding)
    excess = room.excess(encoding, limit)
    if excess > 0 and not room.truncate:
        message = f"the text has {len(encoding.ids):,} tokens; the limit is {limit:,} (ask for truncation to cut it)"
        return EncodedText(input=EncodeInput(ids=[]), error=ContextLengthExceeded(message))
    dropped = _dropped(encoding, excess, room) if excess > 0 else frozenset()
    if excess > len(dropped):
        message = f"the text cannot be cut to {limit:,} tokens: the part that must stay is longer"
        return EncodedText(input=EncodeInput(ids=[]), error=ContextLengthExceeded(message))
    ids, type_ids = encoding.ids, encoding.type_ids
    if dropped:
        kept = [position for position in range(len(ids)) if position not in dropped]
        ids, type_ids = [ids[position] for position in kept], [type_ids[position] for position in kept]
    return EncodedText(
        input=EncodeInput(ids=ids, type_ids=type_ids if any(type_ids) else [], skip_pooling=skip),
        num_truncated=max(excess, 0),
    )


def _dropped(encoding: Encoding, excess: int, room: Room) -> frozenset[int]:
    """Positions to leave out: last (first) tokens of one text, or (`longest`) of whichever text is longer at the time.

    Worked example: a pair of 5 and 3 tokens that is 3 too long loses, `longest`, two of the first (5, 4 > 3), then one
    of the second (3 = 3: the second gives first, as `transformers` does it).
    """
    owners = list(enumerate(encoding.sequence_ids))
    tails = [deque(position for position, owner in owners if owner == number) for number in (0, 1)]
    dropped: set[int] = set()
    for _ in range(excess):
        if room.side == "longest":
            tail = tails[0] if len(tails[0]) > len(tails[1]) else tails[1]
        else:
            tail = tails[0 if room.side == "first" else 1]
        if not tail:
            break
        dropped.add(tail.popleft() if room.truncate == "start" else tail.pop())
    return frozenset(dropped)


async def run_texts(
    engine: EncodeEngine,
    model: LoadedModel,
    texts: Sequence[EncodedText],
    output: EncodeOutput,
    options: EncodeOptions,
    *,
    head: str = "",
    max_numbers: int | None = None,
) -> None:
    """Sends the sound texts through the network together; each gets its values or its own error.

    Raises: PayloadTooLarge as soon as there are more than `max_numbers` in all of their values.
    """
    sound = [text for text in texts if text.error is None]
    if not sound:
        return
    results = await engine.encode(
        EncodeRequest(
            model=model.key,
            output=output,
            inputs=[text.input for text in sound],
            head=head,
            priority=options.priority,
            deadline=options.deadline,
            client=options.client,
            task=options.task,
            max_numbers=max_numbers,
        )
    )
    for text, result in zip(sound, results, strict=True):
        text.started = result.started
        if result.error is not None:
            text.error = GenerationFailed(result.error)
        else:
            text.values = np.frombuffer(result.data, dtype="<f4").reshape(result.shape)


def raise_if_all_failed(texts: Sequence[EncodedText], *, param: str, single: bool) -> None:
    """A lone text's error is the request's; in a list each error stays with its text, unless nothing is left.

    Raises: the first error, with the field that it belongs to.
    """
    failed = [index for index, text in enumerate(texts) if text.error is not None]
    if failed and len(failed) == len(texts):
        error = texts[failed[0]].error
        assert error is not None
        error.param = param if single else f"{param}.{failed[0]}"
        raise error
