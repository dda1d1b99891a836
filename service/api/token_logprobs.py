"""Log-probabilities in OpenAI's two shapes: parallel lists (completions) and one object per token (chat).

Knows how a token is shown: as its text in the middle of a sentence, or as `bytes:\\xe4\\xbd` where it is no character.
API process only.
"""

from collections.abc import Sequence
from dataclasses import replace

from model.batch import TokenLogprobs
from model.tokenizer import Tokenizer
from service.api.answers_openai import (
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

LEAST = -9999.0
"""JSON has no infinity; OpenAI's own stand-in."""


def token_text(tokenizer: Tokenizer, id: int) -> str:
    data = tokenizer.pieces.as_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs | int], offsets: Sequence[int]
) -> CompletionLogprobs:
    """An id alone stands for a prompt's first token, which nothing predicts."""
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=list(offsets))
    for token in tokens:
        if isinstance(token, int):
            found.tokens.append(token_text(tokenizer, token))
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            continue
        text = token_text(tokenizer, token.token_id)
        top = {
            token_text(tokenizer, id): finite(value)
            for id, value in zip(token.top_ids, token.top_logprobs, strict=True)
        }
        found.tokens.append(text)
        found.token_logprobs.append(finite(token.logprob))
        found.top_logprobs.append(top | {text: finite(token.logprob)})
    return found


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs], count: int) -> PromptLogprobs:
    """All of a prompt's, in vLLM's shape, each with its `count` likeliest; `tokens` are those behind the first."""
    return [None, *(_prompt_logprob(tokenizer, with_top(token, count)) for token in tokens)]


def _prompt_logprob(tokenizer: Tokenizer, token: TokenLogprobs) -> dict[str, PromptLogprob]:
    ranks = {id: rank for rank, id in enumerate(token.top_ids, start=1)}
    logprobs = {token.token_id: token.logprob, **dict(zip(token.top_ids, token.top_logprobs, strict=True))}
    return {
        str(id): PromptLogprob(logprob=finite(value), rank=ranks.get(id), decoded_token=token_text(tokenizer, id))
        for id, value in logprobs.items()
    }


def with_top(token: TokenLogprobs, count: int) -> TokenLogprobs:
    """With the `count` likeliest alone: a prompt's are found once, for whoever asks for most of them."""
    return replace(token, top_ids=token.top_ids[:count], top_logprobs=token.top_logprobs[:count])


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> list[ChatTokenLogprob]:
    return [
        ChatTokenLogprob(
            token=token_text(tokenizer, token.token_id),
            logprob=finite(token.logprob),
            bytes=list(tokenizer.pieces.as_bytes(token.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=token_text(tokenizer, id), logprob=finite(value), bytes=list(tokenizer.pieces.as_bytes(id))
                )
                for id, value in zip(token.top_ids, token.top_logprobs, strict=True)
            ],
        )
        for token in tokens
    ]


def finite(value: float) -> float:
    return max(value, LEAST)
