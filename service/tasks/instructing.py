"""A text task put to a checkpoint that generates: the prompt that a caller's text becomes, and what fits into it.

An encoder-decoder reads the text behind the prefix that it was trained with, an instructed LM gets an instruction by
its chat template, a plain LM a form to go on with. What is generated for a task is greedy unless the request says
otherwise. Knows neither HTTP nor the single tasks. Runs in the API process.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from model.batch import SamplingParams
from model.generation_defaults import Choices
from model.languages import Direction
from model.tokenizer import TokenizerError
from service.engine.models import LoadedModel
from service.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from service.tasks.chat import Conversation, chat_prompt, without_thinking
from service.tasks.generation import Generation, GenerationEngine, Prompt, RequestOptions, Usage, start_generation
from service.tasks.prompts import encode_text
from service.tasks.sampling import SamplingOptions, context_limit, sampling_params
from service.tasks.voting import sample

T = TypeVar("T")

TEXT = "{text}"
"""Where the caller's text goes in an instruction, a form or a source."""
MAX_AT_ONCE = 64
"""Generations of one HTTP request that are with the engine at the same time."""
MIN_ROOM = 8
NUM_CUTS = 6
NEUTRAL_CHOICES = {"num_beams": 1, "length_penalty": 1, "early_stopping": False, "no_repeat_ngram_size": 0}
"""What a checkpoint that has no beams can do: nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One task in the words of each kind of checkpoint."""

    instruction: str
    form: str
    source: str = TEXT
    """What an encoder-decoder reads, behind its own prefix."""
    declared_task: str | None = None
    """Its name in `task_specific_params`."""
    direction: Direction = field(default_factory=Direction)
    max_tokens: int = 256
    """An LM's, where the request leaves it open."""


@dataclass(slots=True, kw_only=True)
class Spent:
    """Tokens of an answer; `map_*` is the part of it that went into pieces of a long text."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    truncated_tokens: int = 0
    map_calls: int = 0
    map_prompt_tokens: int = 0
    map_completion_tokens: int = 0

    @classmethod
    def total(cls, parts: "Iterable[Spent]") -> "Spent":
        total = cls()
        for part in parts:
            total.add(part)
        return total

    def add(self, part: "Spent") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(part, name))

    @classmethod
    def by(cls, usage: Usage, prompt: Prompt) -> "Spent":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            truncated_tokens=prompt.num_truncated,
        )

    def as_piece(self) -> "Spent":
        """The same as a part of a long text's."""
        return replace(
            self,
            map_calls=1,
            map_prompt_tokens=self.prompt_tokens,
            map_completion_tokens=self.completion_tokens,
        )


@dataclass(slots=True, kw_only=True)
class Written:
    """What came of a prompt: one text per sample."""

    texts: list[str]
    finish_reasons: list[str]
    spent: Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Commission:
    """An assignment for one checkpoint, with what the request says about decoding."""

    model: LoadedModel
    assignment: Assignment
    choices: Choices

    @property
    def is_sequence_to_sequence(self) -> bool:
        return self.model.description.network == "encoder_decoder"

    @property
    def max_tokens(self) -> int:
        """The most that may be written; raises InvalidRequest where the request's choices contradict each other."""
        if self.is_sequence_to_sequence:
            return self._sequence_to_sequence_sampling().max_tokens
        asked = self.choices.max_tokens
        if asked is not None and asked >= self._context:
            message = f"max_tokens is {asked:,}, and the prompt is of the context, too"
            raise ContextLengthExceeded.of_context(self._context, message, param="max_tokens")
        if asked is not None:
            return asked
        return max(1, min(self.assignment.max_tokens, self._context // 4))

    async def room(self) -> int:
        """About how many tokens of the caller's text fit."""
        room = self._limit - len(await self._ids("", "input"))
        if room < MIN_ROOM:
            message = f"{self.model.name} has no room for a text beside {self.max_tokens:,} to be written"
            raise ContextLengthExceeded.of_context(self._context, message, param="max_tokens")
        return room

    async def prompt(self, text: str, *, truncate: bool = False, param: str = "input") -> Prompt:
        """The prompt that `text` becomes; its end is cut where it is too long and that is allowed.

        Raises: InvalidRequest (ContextLengthExceeded among them), naming the field at fault.
        """
        ids = await self._ids(text, param)
        num_tokens = len(ids)
        if num_tokens > self._limit:
            if not truncate:
                raise self._too_long(num_tokens, param)
            ids = await self._cut(text, num_tokens - self._limit, param)
        num_truncated = num_tokens - len(ids)
        if self.is_sequence_to_sequence:
            defaults = self.model.description.sequence_to_sequence
            assert defaults is not None
            sampling = self._sequence_to_sequence_sampling()
            return Prompt(
                ids=defaults.decoder_prompt,
                encoder_ids=ids,
                sampling=sampling,
                continues=False,
                num_truncated=num_truncated,
            )
        stop = () if self.model.chat_template is not None else ("\n",)
        return Prompt(
            ids=ids, sampling=self._sampling(len(ids), param), stop=stop, continues=False, num_truncated=num_truncated
        )

    @property
    def _context(self) -> int:
        return context_limit(self.model)

    @property
    def _limit(self) -> int:
        """How many ids the prompt may have: all that an encoder reads, or what a decoder's answer leaves."""
        return self._context if self.is_sequence_to_sequence else self._context - self.max_tokens

    def _too_long(self, num_tokens: int, param: str) -> ContextLengthExceeded:
        rest = "" if self.is_sequence_to_sequence else f" with {self.max_tokens:,} to be written"
        message = (
            f"The text makes a prompt of {num_tokens:,} tokens; {self.model.name} takes {self._limit:,}{rest} "
            "(ask for truncation to cut it)"
        )
        return ContextLengthExceeded.of_context(self._context, message, param=param)

    async def _ids(self, text: str, param: str) -> list[int]:
        if self.is_sequence_to_sequence:
            return await self._source_ids(text, param)
        model = self.model
        if model.chat_template is None:
            return await encode_text(model, self.assignment.form.replace(TEXT, text), param=param)
        message = {"role": "user", "content": self.assignment.instruction.replace(TEXT, text)}
        # What thinks before it answers is asked to answer at once: the thoughts would be taken for the answer.
        conversation = Conversation(messages=[message], template_variables=without_thinking(model))
        try:
            return await chat_prompt(model, conversation)
        except InvalidRequest as error:
            error.param = param
            raise

    async def _source_ids(self, text: str, param: str) -> list[int]:
        defaults, direction = self.model.description.sequence_to_sequence, self.assignment.direction
        assert defaults is not None
        prefix = defaults.prefix_for(direction.task or self.assignment.declared_task) + direction.text_prefix
        source = prefix + self.assignment.source.replace(TEXT, text)
        own = direction.before is None
        # The limit of `encode_text` is for hopeless texts; a text that is to be cut or mapped may have any length.
        ids = await encode_text(self.model, source, param=param, add_special_tokens=own, max_tokens=1 << 40)
        return [*(direction.before or ()), *ids, *(direction.after or ())]

    async def _cut(self, text: str, excess: int, param: str) -> list[int]:
        """The ids for the text's beginning; cut by tokens of the text, which the prompt may have some fewer of."""
        for _ in range(NUM_CUTS):
            text = await asyncio.to_thread(without_last_tokens, self.model, text, excess)
            ids = await self._ids(text, param)
            excess = len(ids) - self._limit
            if excess <= 0:
                return ids
            if not text:
                break
        raise self._too_long(len(ids), param)

    def _sequence_to_sequence_sampling(self) -> SamplingParams:
        defaults, direction = self.model.description.sequence_to_sequence, self.assignment.direction
        assert defaults is not None
        most = self._context - 1  # the target's first token is there from the start
        asked = self.choices.max_tokens
        if asked is not None and asked > most:
            message = f"max_tokens is {asked:,}; {self.model.name} writes at most {most:,}"
            raise InvalidRequest(message, param="max_tokens")
        choices = self.choices
        if direction.forced_bos_id is not None:
            choices = replace(choices, forced_bos_id=direction.forced_bos_id)
        try:
            return defaults.sampling(direction.task or self.assignment.declared_task, choices)
        except ValueError as error:
            param = "num_beams" if "num_beams" in str(error) else "min_tokens"
            raise InvalidRequest(str(error), param=param) from error

    def _sampling(self, num_prompt_tokens: int, param: str) -> SamplingParams:
        choices = self.choices
        for name, neutral in NEUTRAL_CHOICES.items():
            if getattr(choices, name) not in (None, neutral):
                message = f"{name} is for encoder-decoders; {self.model.name} is none"
                raise UnsupportedParameter(message, param=name)
        options = SamplingOptions(
            max_tokens=self.max_tokens,
            min_tokens=choices.min_tokens or 0,
            temperature=choices.temperature if choices.temperature is not None else 0.0,
            top_k=choices.top_k,
            top_p=choices.top_p,
            min_p=choices.min_p,
            repetition_penalty=choices.repetition_penalty,
            seed=choices.seed,
        )
        return sampling_params(options, self.model, num_prompt_tokens, default_max_tokens=None, prompt_param=param)


def without_last_tokens(model: LoadedModel, text: str, count: int) -> str:
    """The text without its last `count` tokens."""
    try:
        offsets = model.tokenizer.encode_with_offsets(text, add_special_tokens=False).offsets
    except TokenizerError as error:
        raise InvalidRequest(str(error), param="input") from error
    kept = len(offsets) - count
    return text[: offsets[kept - 1][1]] if kept > 0 else ""


class Writer:
    """Has one HTTP request's prompts written, a bounded number of them at once."""

    def __init__(self, engine: GenerationEngine, options: RequestOptions) -> None:
        self.engine = engine
        self.options = options
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def write(self, model: LoadedModel, prompt: Prompt, *, n: int = 1) -> Written:
        """All of what comes of a prompt, `n` times."""
        async with self._slots:
            found = await sample(self.engine, model, prompt, self.options, n=n)
        # What an encoder-decoder writes is given as it is; a reply often begins with white space of its template's.
        texts = found.texts if prompt.encoder_ids else [text.strip() for text in found.texts]
        return Written(texts=texts, finish_reasons=found.finish_reasons, spent=Spent.by(found.usage, prompt))

    def start(self, model: LoadedModel, prompt: Prompt) -> Generation:
        """One prompt's text under way, to be closed by the caller."""
        return start_generation(self.engine, model, [prompt], self.options)


async def side_by_side(works: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of all; the first that raises ends the others."""

    async def run(work: Callable[[], Awaitable[T]]) -> T:
        return await work()

    tasks = [asyncio.create_task(run(work)) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
