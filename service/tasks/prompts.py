"""A caller's text as a prompt's token ids; long texts are tokenized in a thread, hopeless ones not at all.

Knows neither HTTP nor the engine. Runs in the API process.
"""

import asyncio

from model.tokenizer import TokenizerError
from service.engine.models import LoadedModel
from service.errors import ContextLengthExceeded, InvalidRequest
from service.tasks.sampling import context_limit

INLINE_CHARS = 2_000
"""Longer texts are tokenized in a thread: about a millisecond of work."""


async def encode_text(
    model: LoadedModel, text: str, *, param: str, add_special_tokens: bool = True, max_tokens: int | None = None
) -> list[int]:
    """A prompt's ids. `max_tokens` None means the context's length; a text that must be longer is not even tokenized.

    Raises: InvalidRequest for a text that no tokenizer takes, ContextLengthExceeded.
    """
    limit = context_limit(model) if max_tokens is None else max_tokens
    tokenizer = model.tokenizer
    if len(text) > INLINE_CHARS and len(text) > limit * tokenizer.max_token_bytes:
        least = len(text) // tokenizer.max_token_bytes
        message = f"The prompt is too long: {param} has at least {least:,} tokens"
        raise ContextLengthExceeded.of_context(limit, message, param=param)
    try:
        if len(text) <= INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    except TokenizerError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from error


def checked_ids(model: LoadedModel, ids: list[int], *, param: str) -> list[int]:
    """A prompt that came as ids, once all of them are known to be in the vocabulary."""
    try:
        model.tokenizer.check_ids(ids, vocab_size=model.description.vocab_size)
    except TokenizerError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from error
    return ids


def room_for_prompt(model: LoadedModel, max_tokens: int | None) -> int:
    """How many tokens of a prompt leave room for the answer: for `max_tokens`, or where those are open for a quarter.

    At least one; whether even that fits is found out with the rest. What an encoder reads takes no room from an answer.
    """
    limit = context_limit(model)
    if model.description.sequence_to_sequence is not None:
        return limit
    return max(1, limit - (limit // 4 if max_tokens is None else max_tokens))


def truncated(ids: list[int], max_tokens: int | None) -> tuple[list[int], int]:
    """The last `max_tokens` ids where that was asked for, and how many were cut."""
    if max_tokens is None or len(ids) <= max_tokens:
        return ids, 0
    return ids[len(ids) - max_tokens :], len(ids) - max_tokens
