"""Prompts in, text out: the engine's tokens become text, stop strings end it, several choices are merged.

The heart of every generative task. Knows neither HTTP nor the worker; works on the event loop. A `Generation` must be
closed by whoever started it, finished or not: that frees what is still running.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from model.batch import SamplingParams, TokenLogprobs
from model.detokenizer import IncrementalDetokenizer
from model.tokenizer import Tokenizer
from service.engine.flight import Flight, GenerateRequest
from service.engine.models import LoadedModel
from service.engine.protocol import TokenOutput
from service.tasks.reasoning import Thoughts
from service.tasks.sampling import of_choice
from service.tasks.stop_strings import StopStrings


class TokenStream(Protocol):
    """`service.engine.client.GenerationStream`, or a stand-in for it."""

    @property
    def timings(self) -> Flight: ...

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def cancel(self, outcome: str = "cancelled") -> None: ...


class GenerationEngine(Protocol):
    def resolve(self, name: str | None, task: str) -> LoadedModel: ...

    def generate(self, request: GenerateRequest) -> TokenStream: ...


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One prompt's ids, and how its continuations are turned into text."""

    ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """The ids that the caller, not the checkpoint, ends the text by."""
    skip_special_tokens: bool = True
    keep_special: frozenset[int] = frozenset()
    includes_stop: bool = False
    """Whether the stop string that ends a text is part of it."""
    keeps_ids: bool = False
    """Whether the deltas have their tokens' ids."""
    continues: bool = True
    """Whether the text goes on from the prompt's (a completion), or is a text of its own (an assistant's reply)."""
    thoughts: Thoughts = "none"
    num_truncated: int = 0
    encoder_ids: list[int] = field(default_factory=list)
    """Encoder-decoders: the source text; `ids` are then what the target begins with."""

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + len(self.encoder_ids)

    @property
    def read_ids(self) -> list[int]:
        """What the caller's text has become."""
        return self.encoder_ids or self.ids


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What holds for all choices of a request. `deadline` is in `time.monotonic()` seconds."""

    task: str
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""


@dataclass(slots=True)
class Delta:
    """What became certain of one choice: text, and (where logprobs are asked for) the tokens that begin in it."""

    index: int
    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each token's text begins in the choice's text."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The caller's stop string or id that ended the text, if one did."""
    num_tokens: int = 0
    """The choice's so far, this delta's included."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    end_token: TokenLogprobs | None = None
    """The id that ended the text, which is no part of it, where log-probabilities are asked for."""
    ids: list[int] = field(default_factory=list)
    """What has been generated since the last delta, where that is asked for."""


@dataclass(slots=True)
class Usage:
    """Tokens of a whole request; a prompt counts once, however many choices continue it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Choice:
    """One continuation of one prompt; iterate it to its end for its text."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, stream: TokenStream) -> None:
        self.index = index
        self.stream = stream
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._sampling = prompt.sampling
        self._stop_token_ids = frozenset(prompt.stop_token_ids)
        self._stops = StopStrings(prompt.stop, inclusive=prompt.includes_stop)
        self._ids: list[int] | None = [] if prompt.keeps_ids else None
        self._detokenizer: IncrementalDetokenizer = tokenizer.detokenizer(
            skip_special_tokens=prompt.skip_special_tokens, keep=prompt.keep_special, continues=prompt.continues
        )
        self._num_chars = 0
        self._num_given = 0
        self._waiting: list[tuple[int, TokenLogprobs]] = []

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        async for output in self.stream:
            delta = self._take(output)
            if delta is None:
                continue
            if delta.finish_reason is not None:
                self.stream.cancel("stop")  # nothing where the worker has ended it; else a stop string has
                yield delta
                return
            yield delta

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; None while nothing has, or where something else did."""
        return self._stops.found

    def close(self) -> None:
        self.stream.cancel()

    def _take(self, output: TokenOutput) -> Delta | None:
        """The next delta; None while nothing is certain."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        ids, reason = output.token_ids, output.finish_reason
        # The id that ended the text is no part of it.
        ended_by_id = reason == "stop" and bool(ids) and ids[-1] in self._sampling.stop_ids
        shown = ids[:-1] if ended_by_id else ids
        delta = Delta(self.index, prompt_logprobs=output.prompt_logprobs)
        if self._stops or output.logprobs:
            before = self.num_tokens
            if self._add_one_by_one(delta, shown, output.logprobs):
                delta.finish_reason, delta.stop_reason = "stop", self._stops.found
                return self._completed(delta, ids[: self.num_tokens - before])
        else:
            delta.text = self._detokenizer.push(shown)
        self.num_tokens += len(ids)
        if reason is not None:
            self._finish(delta, reason)
            if ended_by_id and output.logprobs:
                delta.end_token = output.logprobs[-1]
            by_id = ended_by_id and ids[-1] in self._stop_token_ids
            delta.stop_reason = ids[-1] if by_id else self._stops.found
        if not (delta.text or delta.tokens or delta.prompt_logprobs or reason is not None):
            if self._ids is not None:
                self._ids += ids
            return None
        return self._completed(delta, ids)

    def _completed(self, delta: Delta, ids: Sequence[int]) -> Delta:
        delta.num_tokens = self.num_tokens
        if self._ids is not None:
            delta.ids, self._ids = [*self._ids, *ids], []
        return delta

    def _add_one_by_one(self, delta: Delta, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bool:
        """Adds each token's text, until a stop string is complete. Returns whether one is."""
        for position, id in enumerate(ids):
            if logprobs:
                self._waiting.append((self._num_chars, logprobs[position]))
            text = self._detokenizer.push((id,))
            count = self.num_tokens + position + 1
            if count <= self._sampling.min_tokens or not self._stops:
                self._give(delta, self._stops.flush() + text)
                continue
            given, stopped = self._stops.feed(text)
            if not stopped and (rest := self._detokenizer.pending) and self._stops.would_stop(rest):
                more, stopped = self._stops.feed(rest)
                text, given = text + rest, given + more
            self._num_chars += len(text)
            self._release(delta, given, everything=False)
            if stopped:
                self.num_tokens = count
                return True
        return False

    def _finish(self, delta: Delta, reason: str) -> None:
        rest = self._detokenizer.flush()
        given, stopped = self._stops.feed(rest)
        delta.finish_reason = "stop" if stopped else reason
        self._num_chars += len(rest)
        self._release(delta, given if stopped else given + self._stops.flush(), everything=not stopped)

    def _give(self, delta: Delta, text: str) -> None:
        self._num_chars += len(text)
        self._release(delta, text, everything=True)

    def _release(self, delta: Delta, text: str, *, everything: bool) -> None:
        """Adds text that may go out, and the waiting tokens that begin in what has gone out."""
        delta.text += text
        self._num_given += len(text)
        while self._waiting and (everything or self._waiting[0][0] < self._num_given):
            offset, token = self._waiting.pop(0)
            delta.offsets.append(offset)
            delta.tokens.append(token)


class Generation:
    """All choices of a request, under way; iterate for their deltas as they come, in any order of choices."""

    def __init__(self, model: LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice]) -> None:
        self.model = model
        self.prompts = prompts
        self.choices = choices

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        if len(self.choices) == 1:
            async for delta in self.choices[0]:
                yield delta
            return
        async with aclosing(_merged(self.choices)) as deltas:
            async for delta in deltas:
                yield delta

    def close(self) -> None:
        """Cancels whatever has not ended."""
        for choice in self.choices:
            choice.close()

    @property
    def usage(self) -> Usage:
        per_prompt = len(self.choices) // len(self.prompts)
        cached = 0
        for start in range(0, len(self.choices), per_prompt):
            # Later choices of a prompt find the first one's blocks: what was there before is what the first found.
            cached += min(choice.num_cached_tokens for choice in self.choices[start : start + per_prompt])
        return Usage(
            prompt_tokens=sum(prompt.num_tokens for prompt in self.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=cached,
        )


def start_generation(
    engine: GenerationEngine, model: LoadedModel, prompts: Sequence[Prompt], options: RequestOptions, *, n: int = 1
) -> Generation:
    """Submits n continuations of each prompt; choice i continues prompt i // n.

    Raises what the engine raises when it does not accept one of them; the others are cancelled then.
    """
    choices: list[Choice] = []
    try:
        for prompt in prompts:
            for number in range(n):
                request = GenerateRequest(
                    model=model.key,
                    prompt_ids=prompt.ids,
                    encoder_ids=prompt.encoder_ids,
                    sampling=of_choice(prompt.sampling, number),
                    priority=options.priority,
                    deadline=options.deadline,
                    cache_salt=options.cache_salt,
                    client=options.client,
                    task=options.task,
                )
                stream = engine.generate(request)
                choices.append(Choice(len(choices), prompt, model.tokenizer, stream))
    except BaseException:
        for choice in choices:
            choice.close()
        raise
    return Generation(model, prompts, choices)


async def _merged(choices: Iterable[Choice]) -> AsyncGenerator[Delta, None]:
    """The deltas of all choices as they come. The first fault ends all of them."""
    deltas: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(maxsize=1)

    async def pump(choice: Choice) -> None:
        try:
            async for delta in choice:
                await deltas.put(delta)
            await deltas.put(None)
        except Exception as error:  # raised to the reader of the merged stream
            await deltas.put(error)

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        running = len(pumps)
        while running:
            delta = await deltas.get()
            if isinstance(delta, BaseException):
                raise delta
            if delta is None:
                running -= 1
            else:
                yield delta
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
