"""A request on its way: what the API process keeps of it until it has ended, enough to run it again from where it was.

Knows nothing of processes or sockets: the client moves flights between the queue and the worker. API process only.
"""

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from model.batch import SamplingParams
from service.engine.models import LoadedModel
from service.engine.protocol import Encode, EncodeInput, EncodeOutput, EncodeResult, Generate, TokenOutput
from service.errors import ServiceError
from service.logs import request_id_context


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """`model` is a key of the directory; `deadline` is in `time.monotonic()` seconds; `client` names the API key."""

    model: str
    prompt_ids: list[int]
    sampling: SamplingParams
    encoder_ids: list[int] = field(default_factory=list)
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    client: str = ""
    task: str = "generate"


class EncodeRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    output: EncodeOutput
    inputs: list[EncodeInput]
    head: str = ""
    priority: int = 0
    deadline: float | None = None
    client: str = ""
    task: str = "embed"
    max_numbers: int | None = None
    """The most that all results may have together: the one that has more ends the request."""


class Trace(Protocol):
    """Whoever traces the HTTP request that a flight belongs to."""

    def add_flight(self, flight: "Flight", ended: float) -> None:
        """It has ended, at `ended` in `time.monotonic()` seconds."""
        ...


trace_context: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""Set for the length of an HTTP request that is traced."""


@dataclass(slots=True)
class Errand:
    """An HTTP request, to which several flights may belong, one after another."""

    under_way: bool = False
    """One of them has ended well: what comes after it belongs to what has been accepted."""
    prompt_tokens: int = 0
    """What those that have ended have computed, however they ended; what the cache had is not counted."""
    output_tokens: int = 0

    def take_account_of(self, flight: "Flight") -> None:
        self.under_way = self.under_way or flight.outcome in ENDED_WELL
        self.prompt_tokens += flight.num_computed_tokens
        self.output_tokens += flight.num_output_tokens


errand_context: ContextVar[Errand | None] = ContextVar("errand", default=None)
"""Set for the length of an HTTP request."""

FLOAT_BYTES = 4
ENDED_WELL = frozenset({"stop", "length"})


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """One accepted request. It ends exactly once: `outcome` is set then and never again."""

    number: int
    model: LoadedModel
    task: str
    client: str
    priority: int
    cost_tokens: int
    num_prompt_tokens: int
    accepted: float
    deadline: float | None
    dispatched: bool = False
    started: float | None = None
    first_output: float | None = None
    last_output: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    deaths_without_progress: int = 0
    num_replays: int = 0
    outcome: str | None = None
    error: ServiceError | None = None
    stopped_here: bool = False
    """Ended from this side and not by the worker, with all that the caller wanted (a stop string)."""
    on_end: "Callable[[Flight], None] | None" = None
    """Who else wants to know that it has ended (its shadow's comparison)."""
    request_id: str = ""
    """The HTTP request's, for the log."""
    trace: Trace | None = None
    errand: Errand | None = None
    deadline_timer: asyncio.TimerHandle | None = None
    _waiter: asyncio.Future[None] | None = None

    @property
    def num_computed_tokens(self) -> int:
        """Of its prompt, as far as is known here."""
        return 0 if self.started is None else max(0, self.num_prompt_tokens - self.num_cached_tokens)

    def message(self) -> Generate | Encode:
        """What the worker is told, now: for a replay it includes what was delivered before."""
        raise TypeError("a flight is a GenerateFlight or an EncodeFlight")

    def again(self, model: LoadedModel, number: int) -> "Flight":  # noqa: ARG002
        """The same request on another checkpoint, from its beginning."""
        raise TypeError("a flight is a GenerateFlight or an EncodeFlight")

    def described(self) -> dict[str, str]:
        """Which one it is, for a log line."""
        return {"request_id": self.request_id, "model": self.model.key, "task": self.task}

    def end(self, outcome: str, error: ServiceError | None = None) -> None:
        assert self.outcome is None, "a request ends once"
        self.outcome, self.error = outcome, error
        if self.errand is not None:
            self.errand.take_account_of(self)
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
        self.wake()
        if self.on_end is not None:
            self.on_end(self)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changed(self) -> None:
        """Returns after the next `wake`. One reader at a time."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


@dataclass(slots=True, kw_only=True, eq=False)
class GenerateFlight(Flight):
    request: GenerateRequest
    delivered_ids: list[int] = field(default_factory=list)
    unread: TokenOutput | None = None
    has_prompt_logprobs: bool = False

    def message(self) -> Generate:
        request = self.request
        return Generate(
            request_id=self.number,
            model=self.model.lane_key,
            adapter="" if self.model.base is None else self.model.key,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            output_ids=self.delivered_ids,
            encoder_ids=request.encoder_ids,
            priority=request.priority,
            arrival=self.accepted,
            deadline=request.deadline,
            cache_salt=request.cache_salt,
        )

    def again(self, model: LoadedModel, number: int) -> "GenerateFlight":
        return generate_flight(self.request, model, number)

    def deliver(self, output: TokenOutput) -> None:
        """Adds what a step gave; what nobody has read yet is kept as one merged output, however slow the reader."""
        if self.has_prompt_logprobs:
            output.prompt_logprobs = []
        self.has_prompt_logprobs = self.has_prompt_logprobs or bool(output.prompt_logprobs)
        self.delivered_ids.extend(output.token_ids)
        if self.unread is None:
            self.unread = output
        else:
            self.unread.token_ids.extend(output.token_ids)
            self.unread.logprobs.extend(output.logprobs)
            self.unread.prompt_logprobs.extend(output.prompt_logprobs)
            self.unread.finish_reason = output.finish_reason
            self.unread.num_cached_tokens = max(self.unread.num_cached_tokens, output.num_cached_tokens)
        self.wake()


@dataclass(slots=True, kw_only=True, eq=False)
class EncodeFlight(Flight):
    """`results[i]` is set when input i is done; a replay asks only for those that are not."""

    request: EncodeRequest
    results: list[EncodeResult | None]
    asked: list[int] = field(default_factory=list)
    """Which input each index of the message that is under way stands for."""
    num_numbers: int = 0
    """Of all results that are here."""

    @property
    def has_too_many_numbers(self) -> bool:
        return self.request.max_numbers is not None and self.num_numbers > self.request.max_numbers

    @property
    def num_computed_tokens(self) -> int:
        entries = zip(self.request.inputs, self.results, strict=True)
        return sum(len(entry.ids) for entry, result in entries if result is not None)

    def message(self) -> Encode:
        self.asked = [index for index, result in enumerate(self.results) if result is None]
        return Encode(
            request_id=self.number,
            model=self.model.key,
            output=self.request.output,
            inputs=[self.request.inputs[index] for index in self.asked],
            head=self.request.head,
            priority=self.request.priority,
            arrival=self.accepted,
            deadline=self.request.deadline,
        )

    def again(self, model: LoadedModel, number: int) -> "EncodeFlight":
        return encode_flight(self.request, model, number)

    def deliver(self, result: EncodeResult) -> bool:
        """Files one input's result. Returns whether that was the last one."""
        result.index = self.asked[result.index]
        self.results[result.index] = result
        self.num_numbers += len(result.data) // FLOAT_BYTES
        return all(entry is not None for entry in self.results)


def generate_flight(request: GenerateRequest, model: LoadedModel, number: int) -> GenerateFlight:
    num_prompt = len(request.prompt_ids) + len(request.encoder_ids)
    cost = num_prompt + request.sampling.max_tokens
    return GenerateFlight(request=request, cost_tokens=cost, **_common(request, model, number, num_prompt))


def encode_flight(request: EncodeRequest, model: LoadedModel, number: int) -> EncodeFlight:
    num_prompt = sum(len(entry.ids) for entry in request.inputs)
    common = _common(request, model, number, num_prompt)
    return EncodeFlight(request=request, results=[None] * len(request.inputs), cost_tokens=num_prompt, **common)


def _common(
    request: GenerateRequest | EncodeRequest, model: LoadedModel, number: int, num_prompt_tokens: int
) -> dict[str, Any]:
    return {
        "number": number,
        "model": model,
        "task": request.task,
        "client": request.client,
        "priority": request.priority,
        "num_prompt_tokens": num_prompt_tokens,
        "accepted": time.monotonic(),
        "deadline": request.deadline,
        "request_id": request_id_context.get(),
        "trace": trace_context.get(),
        "errand": errand_context.get(),
    }
