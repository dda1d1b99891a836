"""Labels of a text's parts (names, places, parts of speech), as transformers' token classification pipeline has them.

From the logits of each token to spans of the text: tokens are taken alone, made to agree within their words, or joined
with their neighbours of the same label (`B-` begins a new one). Knows neither HTTP nor torch. Runs in the API process.

Legend: T tokens of a text, L labels.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from model.description import CheckpointDescription
from model.tokenizer import Encoding, Tokenizer, TokenizerError
from service.engine.models import LoadedModel
from service.engine.protocol import EncodeInput
from service.errors import ContextLengthExceeded, InvalidRequest, ServiceError
from service.tasks.confidence import Numbers, softmax
from service.tasks.encoding import INLINE_CHARS, EncodedText, EncodeEngine, EncodeOptions, max_input_tokens, run_texts

TASK = "token_classify"

Aggregation = Literal["none", "simple", "first", "average", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A token, a word or several of them: `start` and `end` are characters of the text."""

    label: str
    score: float
    start: int
    end: int
    pieces: tuple[str, ...]
    """The tokenizer's own spelling of its tokens; what the tokenizer does not know is as in the text."""


@dataclass(slots=True, kw_only=True)
class Tagged:
    """What a text's parts are, or the text's own fault."""

    encoded: EncodedText
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    piece: str
    scores: Numbers  # [L]
    start: int
    end: int
    continues: bool
    """Whether it goes on with the word of the token before."""


async def tag(
    engine: EncodeEngine,
    model: LoadedModel,
    texts: Sequence[str],
    options: EncodeOptions,
    *,
    aggregation: Aggregation,
    ignored: Sequence[str],
) -> list[Tagged]:
    """The parts of every text whose labels are not among the ignored ones."""
    if sum(map(len, texts)) > INLINE_CHARS:
        read = await asyncio.to_thread(lambda: [_read(model, text, options) for text in texts])
    else:
        read = [_read(model, text, options) for text in texts]
    found = [Tagged(encoded=encoded) for encoded, _ in read]
    head, labels, temperature = _token_head(model.description)
    await run_texts(engine, model, [entry.encoded for entry in found], "token_logits", options, head=head)
    for entry, (_, encoding), text in zip(found, read, texts, strict=True):
        values = entry.encoded.values
        if values is None or encoding is None:
            continue
        tokens = _tokens(model.tokenizer, encoding, softmax(values.astype(np.float64) / temperature), text)
        parts = parts_of(tokens, labels, aggregation)
        entry.parts = [part for part in parts if part.label not in ignored]
    return found


def _token_head(description: CheckpointDescription) -> tuple[str, tuple[str, ...], float]:
    """The head that is asked ("": the checkpoint's own), its labels and its temperature."""
    if description.head == "token_classification":
        return "", description.labels, 1.0
    name, config = next((name, config) for name, config in description.heads.items() if config.kind == "token")
    return name, config.labels, config.temperature or 1.0


def _read(model: LoadedModel, text: str, options: EncodeOptions) -> tuple[EncodedText, Encoding | None]:
    """The text's ids, and where each lies; its last tokens are left out where it is too long and that was asked for."""
    try:
        encoding = model.tokenizer.encode_with_offsets(text)
    except TokenizerError as error:
        return _faulty(InvalidRequest(str(error))), None
    limit, length = max_input_tokens(model), len(encoding.ids)
    excess = length - limit
    kept = list(range(length))
    if excess > 0:
        if not options.truncate:
            message = f"the text has {length:,} tokens; the limit is {limit:,} (ask for truncation to cut it)"
            return _faulty(ContextLengthExceeded(message)), None
        own = [place for place in kept if not encoding.special_tokens_mask[place]]
        dropped = set(own[-excess:])
        kept = [place for place in kept if place not in dropped]
    cut = Encoding(
        ids=[encoding.ids[place] for place in kept],
        type_ids=[encoding.type_ids[place] for place in kept],
        offsets=[encoding.offsets[place] for place in kept],
        sequence_ids=[encoding.sequence_ids[place] for place in kept],
        special_tokens_mask=[encoding.special_tokens_mask[place] for place in kept],
    )
    return EncodedText(input=EncodeInput(ids=cut.ids), num_truncated=max(excess, 0)), cut


def _faulty(error: ServiceError) -> EncodedText:
    return EncodedText(input=EncodeInput(ids=[]), error=error)


def _tokens(tokenizer: Tokenizer, encoding: Encoding, scores: Numbers, text: str) -> list[_Token]:
    """scores [T, L]. A tokenizer that marks what goes on a word is believed; else words are what spaces divide."""
    marks = bool(getattr(tokenizer.backend.model, "continuing_subword_prefix", None))
    unknown = tokenizer.token_id(tokenizer.special_tokens.get("unk_token", ""))
    found = []
    for place, id in enumerate(encoding.ids):
        if encoding.special_tokens_mask[place]:
            continue
        start, end = encoding.offsets[place]
        if marks:
            continues = len(tokenizer.token(id) or "") != end - start
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        known = id != unknown
        piece = (tokenizer.token(id) or "") if known else text[start:end]
        found.append(_Token(piece=piece, scores=scores[place], start=start, end=end, continues=continues and known))
    return found


def word_of(tokenizer: Tokenizer, part: Part, aggregation: Aggregation) -> str:
    """What the tokenizer makes of a part: the spelling of a token that is to be alone, else text."""
    if aggregation == "none" or tokenizer.backend.decoder is None:
        return " ".join(part.pieces)
    word: str = tokenizer.backend.decoder.decode(list(part.pieces))
    return word


def parts_of(tokens: Sequence[_Token], labels: Sequence[str], aggregation: Aggregation) -> list[Part]:
    """`none`: each token by itself; `simple`: neighbours joined; the others: words first, then neighbours."""
    if aggregation in ("none", "simple"):
        parts = [_part([token], token.scores, labels) for token in tokens]
    else:
        parts = [_part(word, _scores_of(word, aggregation), labels) for word in _words(tokens)]
    return parts if aggregation == "none" else _joined(parts)


def _part(tokens: Sequence[_Token], scores: Numbers, labels: Sequence[str]) -> Part:
    best = int(scores.argmax())
    return Part(
        label=labels[best],
        score=float(scores[best]),
        start=tokens[0].start,
        end=tokens[-1].end,
        pieces=tuple(token.piece for token in tokens),
    )


def _words(tokens: Sequence[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _scores_of(word: Sequence[_Token], aggregation: Aggregation) -> Numbers:
    match aggregation:
        case "first":
            return word[0].scores
        case "max":
            return max(word, key=lambda token: float(token.scores.max())).scores
        case _:
            mean: Numbers = np.mean([token.scores for token in word], axis=0)
            return mean


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one label, without its `B-` or `I-`; what begins with `B-` is not joined to what lies before."""
    groups: list[list[Part]] = []
    for part in parts:
        if groups and _name(part.label) == _name(groups[-1][-1].label) and not part.label.startswith("B-"):
            groups[-1].append(part)
        else:
            groups.append([part])
    return [
        Part(
            label=group[0].label.split("-", 1)[-1],
            score=float(np.mean([part.score for part in group])),
            start=group[0].start,
            end=group[-1].end,
            pieces=tuple(piece for part in group for piece in part.pieces),
        )
        for group in groups
    ]


def _name(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
