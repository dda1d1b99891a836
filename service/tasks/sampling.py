"""What a caller asked for and what the checkpoint says about itself, merged into `SamplingParams`.

The request wins, then generation_config.json, then OpenAI's defaults: temperature 1, unless the checkpoint says
`do_sample: false`, which means greedy. Knows nothing of HTTP. Runs in the API process.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.batch import Grammar, SamplingParams
from model.tokenizer import TokenizerError
from service.engine.models import LoadedModel
from service.errors import ContextLengthExceeded, InvalidRequest

SEED_MASK = 2**64 - 1
ANY_SEED = -1
"""vLLM's and llama.cpp's way to ask for none in particular."""
INLINE_CHARS = 2_000
"""More of bad words than this are tokenized in a thread: about a millisecond of work."""
SMALLEST_TOP_P = 1e-9
"""A nucleus of no mass at all is the most likely token alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What a request's options say of single tokens, in a checkpoint's ids."""

    stop_ids: tuple[int, ...]
    allowed_ids: tuple[int, ...]
    banned_sequences: tuple[tuple[int, ...], ...]
    logit_bias: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """What a request sets; None where it leaves the choice to the checkpoint."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    token_rules: TokenRules | None = None
    """None: made anew for each prompt, by `sampling_params`."""


async def with_token_rules(options: SamplingOptions, model: LoadedModel) -> SamplingOptions:
    """The same for all prompts of a request, made in a thread where there are many bad words.

    Raises: InvalidRequest for ids outside the vocabulary.
    """
    if sum(map(len, options.bad_words)) > INLINE_CHARS:
        return replace(options, token_rules=await asyncio.to_thread(_token_rules, options, model))
    return replace(options, token_rules=_token_rules(options, model))


def _token_rules(options: SamplingOptions, model: LoadedModel) -> TokenRules:
    _check_ids(options, model)
    eos_ids = () if options.ignore_eos else end_ids(model)
    return TokenRules(
        stop_ids=tuple(dict.fromkeys((*eos_ids, *options.stop_token_ids))),
        allowed_ids=options.allowed_token_ids,
        banned_sequences=_banned(model, options.bad_words),
        logit_bias={int(key): value for key, value in options.logit_bias.items()},
    )


def sampling_params(
    options: SamplingOptions,
    model: LoadedModel,
    num_prompt_tokens: int,
    *,
    default_max_tokens: int | None,
    prompt_param: str,
    max_tokens_param: str = "max_tokens",
) -> SamplingParams:
    """The parameters of the first choice (see `of_choice`). `default_max_tokens` None means: to the context's end.

    Raises:
        ContextLengthExceeded: the prompt, or the prompt and the tokens asked for, are more than the context holds.
        InvalidRequest: a token id is outside the vocabulary, or two options contradict each other.
    """
    max_tokens = _max_tokens(
        options.max_tokens,
        num_prompt_tokens,
        model,
        default=default_max_tokens,
        prompt_param=prompt_param,
        max_tokens_param=max_tokens_param,
    )
    if options.min_tokens > max_tokens:
        message = f"min_tokens is {options.min_tokens:,} and the most that may come is {max_tokens:,}"
        raise InvalidRequest(message, param="min_tokens")
    rules = options.token_rules or _token_rules(options, model)
    defaults = model.description.generation_defaults
    greedy = defaults.get("do_sample") is False
    sampled = {} if greedy else defaults
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if greedy else _number(defaults, "temperature", 1.0)
    top_k = options.top_k if options.top_k is not None else int(_number(sampled, "top_k", 0))
    top_p = options.top_p if options.top_p is not None else _number(sampled, "top_p", 1.0)
    repetition = options.repetition_penalty
    declared = model.description.declared_rules
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=max(top_k, 0),
        top_p=max(top_p, SMALLEST_TOP_P),
        min_p=options.min_p if options.min_p is not None else _number(sampled, "min_p", 0.0),
        repetition_penalty=repetition if repetition is not None else _number(defaults, "repetition_penalty", 1.0),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=rules.logit_bias,
        seed=seed_of(options.seed),
        # What only a default asks for gives way to a shorter limit that was asked for.
        min_tokens=max(options.min_tokens, min(declared.min_tokens(num_prompt_tokens), max_tokens)),
        no_repeat_ngram_size=declared.no_repeat_ngram_size,
        forced_eos_id=declared.forced_eos_id,
        suppressed_ids=declared.suppressed_ids,
        allowed_ids=rules.allowed_ids,
        banned_sequences=(*declared.banned_sequences, *rules.banned_sequences),
        stop_ids=rules.stop_ids,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        grammar=options.grammar,
    )


def seed_of(asked: int | None) -> int:
    """The caller's, or one that nobody has."""
    return (secrets.randbits(63) if asked in (None, ANY_SEED) else asked) & SEED_MASK


def of_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of choice `index` of n: its own seed, derived from the first's, so that n = 1 is its beginning."""
    if index == 0:
        return params
    digest = hashlib.blake2b(f"{params.seed}/{index}".encode(), digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little"))


def context_limit(model: LoadedModel) -> int:
    """Tokens that a prompt and its completion may have together: what the checkpoint knows, or what the cache holds."""
    loaded, known = model.loaded, model.description.context_length
    return known if loaded is None or not loaded.num_blocks else min(known, loaded.num_blocks * loaded.block_size)


def end_ids(model: LoadedModel) -> tuple[int, ...]:
    """The ids that end a text: the checkpoint's, and its tokenizer's end of text."""
    eos = model.tokenizer.eos_id
    return tuple(dict.fromkeys((*model.description.eos_ids, *(() if eos is None else (eos,)))))


def _max_tokens(
    asked: int | None,
    num_prompt_tokens: int,
    model: LoadedModel,
    *,
    default: int | None,
    prompt_param: str,
    max_tokens_param: str,
) -> int:
    context = context_limit(model)
    room = context - num_prompt_tokens
    if room < 0 or (room == 0 and asked != 0):
        raise ContextLengthExceeded.of_context(
            context,
            f"The prompt is too long: it has {num_prompt_tokens:,} tokens; {model.name} holds {context:,}, prompt and "
            "completion together",
            param=prompt_param,
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextLengthExceeded.of_context(
            context,
            f"The request needs {num_prompt_tokens + asked:,} "
            f"({num_prompt_tokens:,} in the prompt, {asked:,} to generate)",
            param=max_tokens_param,
        )
    return asked


def _banned(model: LoadedModel, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Each word's ids, at the beginning of a text and behind a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


def _check_ids(options: SamplingOptions, model: LoadedModel) -> None:
    vocab_size = model.description.vocab_size
    for param, ids in (
        ("stop_token_ids", options.stop_token_ids),
        ("allowed_token_ids", options.allowed_token_ids),
    ):
        try:
            model.tokenizer.check_ids(ids, vocab_size=vocab_size)
        except TokenizerError as error:
            raise InvalidRequest(str(error), param=param) from error
    for key in options.logit_bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            message = f"logit_bias: {key[:32]!r} is not a token id below {vocab_size:,}"
            raise InvalidRequest(message, param="logit_bias")


def _number(defaults: Mapping[str, Any], name: str, otherwise: float) -> float:
    """A checkpoint's own files may say anything; what is not a number is as if it were absent."""
    value = defaults.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise
