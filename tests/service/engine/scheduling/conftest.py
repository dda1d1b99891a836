"""Factories for the scheduler's tests, and a runner whose keys and values are the very prefixes that they stand for.

`FakeRunner` keeps, for every slot of the cache, what a network would have computed there (everything that the slot's
keys and values depend on), and checks that every slot that a row reads holds the right prefix. Its next tokens are a
function of the known tokens alone, so that a request has one right answer whatever happens around it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import pytest

from model.batch import Batch, Row, RowOutput, SamplingParams, StepOutput, TokenLogprobs
from model.block_manager import BlockManager
from service.engine.beam_search import BeamSearch, num_beam_candidates
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.sequence import Sequence
from tests.service.engine.scheduling.fake_draft import FakeDraft

VOCAB = 12
REPEATING = 3
"""The seed of requests whose answer repeats itself, three tokens long."""


def noise(*key: object) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=4).digest(), "little")


@dataclass
class Request:
    """A request as the test knows it; `answer` is what it must get, however it is scheduled."""

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    encoder_ids: list[int] = field(default_factory=list)
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    cache_salt: str = ""
    adapter: int | None = None
    fails_at: int | None = None
    """Number of known output ids at which its row comes back with an error."""
    poisons: bool = False
    """Whether every step that it is in raises."""

    def sequence(self) -> Sequence:
        return Sequence(
            self.request_id,
            self.prompt_ids,
            self.sampling,
            output_ids=list(self.output_ids),
            encoder_ids=self.encoder_ids,
            priority=self.priority,
            arrival=self.arrival,
            deadline=self.deadline,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
        )

    def next_token(self, output_ids: list[int]) -> int:
        reason = [len(output_ids) % 3] if self.sampling.seed == REPEATING else output_ids
        token = noise(self.sampling.seed, self.encoder_ids, self.prompt_ids, reason) % VOCAB
        if token in self.sampling.stop_ids and len(output_ids) < self.sampling.min_tokens:
            return VOCAB
        return token

    def grammar_finished(self, output_ids: list[int]) -> bool:
        return self.sampling.grammar is not None and noise("grammar", output_ids) % 5 == 0

    def candidates(self, output_ids: list[int]) -> list[tuple[int, float]]:
        beam = self.sampling.beam
        assert beam is not None
        scores = [(token, -(noise(self.encoder_ids, output_ids, token) % 5000) / 1000) for token in range(VOCAB * 3)]
        scores.sort(key=lambda entry: (-entry[1], entry[0]))
        return scores[: num_beam_candidates(beam.num_beams, len(self.sampling.stop_ids))]

    def answer(self, max_model_len: int) -> tuple[list[int], str]:
        """Its output ids (those it came with included) and finish reason."""
        limit = min(self.sampling.max_tokens, max_model_len - len(self.prompt_ids))
        if self.sampling.beam is not None:
            return self._beam_answer(limit) if limit > 0 else ([], "length")
        output_ids = list(self.output_ids)
        while not self._has_stopped(output_ids):
            if len(output_ids) >= limit:
                return output_ids, "length"
            output_ids.append(self.next_token(output_ids))
        return output_ids, "stop"

    def _has_stopped(self, output_ids: list[int]) -> bool:
        if not output_ids:
            return False
        by_id = output_ids[-1] in self.sampling.stop_ids and len(output_ids) > self.sampling.min_tokens
        return by_id or self.grammar_finished(output_ids[:-1])

    def _beam_answer(self, limit: int) -> tuple[list[int], str]:
        assert self.sampling.beam is not None
        search = BeamSearch(self.sampling.beam, eos_ids=self.sampling.stop_ids, max_tokens=limit)
        hypotheses: list[list[int]] = [[]]
        while not search.is_done:
            rows = search.advance([self.candidates(hypothesis) for hypothesis in hypotheses])
            hypotheses = [[*hypotheses[parent], token] for parent, token in rows]
        return search.best, search.finish_reason


class StepFailedError(Exception):
    pass


class FakeRunner:
    """Runs batches against a dictionary from slot to content. `requests` tells what a row's request is."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.requests: dict[int, Request] = {}
        """By the identity of the prompt's list, which rows share with their request."""
        self.memory: dict[int, object] = {}
        self.tokens: dict[int, int | None] = {}
        """What the last step sampled, by sequence: what only the device knows when a step is made ahead."""
        self.launched = Batch(rows=[])
        """The last step as it was launched."""
        self.draft: FakeDraft | None = None

    def add(self, request: Request) -> None:
        self.requests[id(request.prompt_ids)] = request

    def run(self, batch: Batch, *, fails: bool = False) -> StepOutput:
        self._copy(batch.block_copies)
        rows = [self._fed(row) for row in batch.rows]
        batch = self.launched = replace(batch, rows=rows)
        requests = [self.requests[id(row.prompt_ids)] for row in rows]
        fails = fails or any(request.poisons for request in requests)
        if self.draft is not None:
            self.draft.run(rows, fails=fails)
        if fails:
            self.spoil(batch)
            raise StepFailedError
        written: set[int] = set()
        for row, request in zip(batch.rows, requests, strict=True):
            if row.encode:
                self._encode(row, request, written)
        for row, request in zip(batch.rows, requests, strict=True):
            self._write(row, request, written)
        for row, request in zip(batch.rows, requests, strict=True):
            self._read(row, request)
        outputs = [self._output(row, request) for row, request in zip(rows, requests, strict=True)]
        self.tokens = {output.sequence_id: output.token_id for output in outputs}
        return StepOutput(outputs)

    def _fed(self, row: Row) -> Row:
        """What a device sees of a row when it is launched; a fed one with the token sampled for it one step before."""
        row = replace(
            row,
            output_ids=list(row.output_ids),
            block_ids=list(row.block_ids),
            cross_block_ids=list(row.cross_block_ids),
        )
        if not row.fed:
            return row
        assert row.token_ids == [0]
        token = self.tokens[row.sequence_id]
        # A row that failed has a token all the same on a device: anything.
        token = VOCAB if token is None else token
        return replace(row, token_ids=[token], output_ids=[*row.output_ids, token])

    def slot(self, block_ids: list[int], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def guess(self, row: Row, known: list[int]) -> int:
        """What a draft network guesses to follow: the right token, three times in four."""
        right = self.requests[id(row.prompt_ids)].next_token(known[len(row.prompt_ids) :])
        return right if noise("guess", known) % 4 else VOCAB + 1

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies all at once; the order of the list must not matter."""
        size = self.block_size
        in_order = dict(self.memory)
        for source, target in pairs:
            for offset in range(size):
                in_order[target * size + offset] = in_order.get(source * size + offset)
        at_once = dict(self.memory)
        for source, target in pairs:
            for offset in range(size):
                at_once[target * size + offset] = self.memory.get(source * size + offset)
        assert in_order == at_once
        self.memory = at_once

    def spoil(self, batch: Batch) -> None:
        """A step that raised has written anything anywhere that it was to write to."""
        for row in batch.rows:
            for position in range(row.start, row.start + len(row.token_ids)):
                self.memory[self.slot(row.block_ids, position)] = "spoilt"
            for position in range(len(row.encoder_ids) if row.encode else 0):
                self.memory[self.slot(row.cross_block_ids, position)] = "spoilt"
        for _, target in batch.block_copies:
            for offset in range(self.block_size):
                self.memory[target * self.block_size + offset] = "spoilt"

    def _encode(self, row: Row, request: Request, written: set[int]) -> None:
        for position in range(len(row.encoder_ids)):
            self._store(row.cross_block_ids, position, self._source(row, request, position), written)

    def _write(self, row: Row, request: Request, written: set[int]) -> None:
        known = row.prompt_ids + row.output_ids + drafted(row)
        end = row.start + len(row.token_ids)
        assert row.token_ids, "a row without tokens"
        assert row.adapter == request.adapter
        assert row.token_ids == known[row.start : end]
        assert len(row.token_ids) > row.num_drafted, "guesses behind nothing"
        assert row.samples == (end == len(known))
        for position in range(row.start, end):
            self._store(row.block_ids, position, self._content(row, request, position), written)

    def _store(self, block_ids: list[int], position: int, content: object, written: set[int]) -> None:
        slot = self.slot(block_ids, position)
        assert slot not in written, "two rows write one slot"
        written.add(slot)
        self.memory[slot] = content

    def _read(self, row: Row, request: Request) -> None:
        for position in range(row.start + len(row.token_ids)):
            held = self.memory.get(self.slot(row.block_ids, position))
            assert held == self._content(row, request, position), f"position {position} holds {held}"
        for position in range(len(row.encoder_ids)):
            held = self.memory.get(self.slot(row.cross_block_ids, position))
            assert held == self._source(row, request, position), f"source position {position} holds {held}"

    def _content(self, row: Row, request: Request, position: int) -> object:
        prefix = (row.prompt_ids + row.output_ids + drafted(row))[: position + 1]
        return ("tokens", request.cache_salt, request.adapter, tuple(row.encoder_ids), tuple(prefix))

    def _source(self, row: Row, request: Request, position: int) -> object:
        return ("source", request.cache_salt, tuple(row.encoder_ids), position)

    def _output(self, row: Row, request: Request) -> RowOutput:
        output = RowOutput(row.sequence_id)
        if request.fails_at is not None and row.samples and len(row.output_ids) >= request.fails_at:
            output.error = "not finite"
            return output
        if row.sampling.prompt_logprobs is not None:
            end = min(row.start + len(row.token_ids), len(row.prompt_ids) - 1)
            begin = max(row.start, row.sampling.prompt_logprobs_start - 1)
            output.prompt_logprobs = [
                TokenLogprobs(row.prompt_ids[position + 1], float(-position - 1)) for position in range(begin, end)
            ]
        if row.samples and row.sampling.beam is not None:
            output.beam_candidates = request.candidates(row.output_ids)
        elif row.samples:
            output.token_id = request.next_token(row.output_ids)
            output.grammar_finished = request.grammar_finished(row.output_ids)
            self._follow(row, request, output)
        return output

    @staticmethod
    def _follow(row: Row, request: Request, output: RowOutput) -> None:
        known, token = list(row.output_ids), output.token_id
        for guess in drafted(row):
            assert token is not None
            known.append(token)
            if guess != token or (request.fails_at is not None and len(known) >= request.fails_at):
                return
            token = request.next_token(known)
            output.following.append(RowOutput(row.sequence_id, token))


def drafted(row: Row) -> list[int]:
    return row.token_ids[len(row.token_ids) - row.num_drafted :]


class Service:
    """A scheduler, its runner and the books on what every request was given. `check` is the law after each step."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        look_ahead: bool = False,
        seconds_of: Callable[[Batch], float] | None = None,
        draft_seconds_of: Callable[[Batch], float] = lambda _: 0.0,
        **limits: float | None,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        defaults: dict[str, Any] = {"max_batch_tokens": 16, "max_sequences": 4, "max_model_len": 24}
        self.limits = SchedulerLimits(**{**defaults, **limits})
        self.scheduler = Scheduler(self.blocks, self.limits)
        self.runner = FakeRunner(block_size)
        if self.limits.draft_len is not None:
            self.runner.draft = FakeDraft(block_size, self.limits.draft_len, self.runner.guess)
        self.requests: dict[int, Request] = {}
        self.given: dict[int, list[int]] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.ends: dict[int, str] = {}
        self.errors: dict[int, str | None] = {}
        self.blames: dict[int, str | None] = {}
        self.cached: dict[int, int] = {}
        self.seconds_of = seconds_of
        """What a step takes, where that matters; the scheduler is told, and time goes on by it."""
        self.draft_seconds_of = draft_seconds_of
        """What of it a draft network takes."""
        self.now = 0.0
        self.batches: list[Batch] = []
        self.look_ahead = look_ahead
        self.flight: tuple[Batch, StepOutput | None, Batch] | None = None
        """The step whose results are awaited, what they will be, and the batch as it was launched."""
        self.num_ahead = 0
        self.memory_tokens: int | None = None
        """Steps with more tokens fail for want of memory."""

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.given[request.request_id] = list(request.output_ids)
        self.runner.add(request)
        refused = self.scheduler.add(request.sequence(), self.now)
        if refused is not None:
            self.take(refused)

    def take(self, output: Any) -> None:
        number = output.request_id
        assert number not in self.ends, "an output after the end"
        self.given[number] += output.token_ids
        self.cached[number] = output.num_cached_tokens
        if output.prompt_logprobs:
            assert number not in self.prompt_logprobs
            self.prompt_logprobs[number] = output.prompt_logprobs
        if output.finish_reason is not None:
            self.ends[number] = output.finish_reason
            self.errors[number], self.blames[number] = output.error, output.blame

    def cancel(self, request_id: int) -> None:
        output = self.scheduler.cancel(request_id)
        assert (output is None) == (request_id in self.ends)
        if output is not None:
            self.take(output)

    def step(
        self, *, fails: bool = False, landing_fails: bool = False, between: Callable[[], None] | None = None
    ) -> Batch:
        """One turn of the worker's loop; `between` happens while the step runs.

        `landing_fails`: the step before it turns out to have failed when this one has been launched already.
        """
        if self.flight is not None and not self.scheduler.can_look_ahead:
            self.land()
        if self.flight is None:
            for output in self.scheduler.expire(self.now):
                self.take(output)
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule(self.now)
        self.batches.append(batch)
        assert bool(batch.rows) == had_work or self.flight is not None, "work, but no step"
        self.num_ahead += bool(batch.rows) and self.flight is not None
        self.check_limits(batch)
        self.check()
        try:
            result = self.runner.run(batch, fails=fails or self.lacks_memory(batch))
        except StepFailedError:
            result = None
        self.land(fails=landing_fails)
        if batch.rows and self.scheduler.awaits(batch):
            self.flight = (batch, result, self.runner.launched)
        if between is not None:
            between()
        # A step that raises at once is known to have failed once the one before it has landed.
        if not self.look_ahead or result is None:
            self.land()
        self.check()
        return batch

    def lacks_memory(self, batch: Batch) -> bool:
        return self.memory_tokens is not None and batch.num_tokens > self.memory_tokens

    def land(self, *, fails: bool = False) -> None:
        """Takes the results of the step in flight, if there is one."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        batch, result, launched = flight
        if result is None or fails:
            self.runner.spoil(launched)
            outputs = self.scheduler.fail_step(batch, "the step failed", out_of_memory=self.memory_tokens is not None)
        else:
            if self.seconds_of is not None:
                seconds = self.seconds_of(batch)
                self.now += seconds
                self.scheduler.record(batch, seconds, self.draft_seconds_of(batch))
            outputs = self.scheduler.update(batch, result, self.now)
        for output in outputs:
            self.take(output)

    def check_limits(self, batch: Batch) -> None:
        assert len(batch.rows) <= self.limits.max_sequences
        sources = [len(row.encoder_ids) for row in batch.rows if row.encode]
        alone = len({id(row.prompt_ids) for row in batch.rows}) == 1 and sources
        assert batch.num_tokens <= self.limits.max_batch_tokens or alone
        served = self.scheduler.step_request_ids
        for sequence in self.scheduler._planner.running:
            branch = sequence.branches[0]
            ends = self.flight is not None and len(branch.output_ids) + branch.num_pending >= sequence.max_output
            assert alone or ends or sequence.request_id in served
        chunk = self.limits.prefill_chunk or self.limits.max_batch_tokens
        assert all(len(row.token_ids) - row.num_drafted <= chunk for row in batch.rows)
        adapters = [row.adapter or 0 for row in batch.rows]
        assert adapters == sorted(adapters)

    def check(self) -> None:
        """No block leaks, none is shared wrongly, and the books of the scheduler are in order."""
        planner = self.scheduler._planner
        running = planner.running
        held = [sequence.cross_block_ids for sequence in running]
        held += [branch.block_ids for sequence in running for branch in sequence.branches]
        self.blocks.check(held)
        assert running == sorted(running, key=lambda sequence: sequence.urgency)
        assert planner._num_rows == sum(sequence.width for sequence in running)
        here = self.scheduler._sequences.values()
        waiting = [sequence for sequence in here if sequence not in running]
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_waiting == len(waiting)
        compiling = self.scheduler._compiling.values()
        ready = [sequence for sequence in waiting if sequence not in compiling]
        assert planner.num_waiting_tokens == sum(sequence.num_tokens for sequence in ready)
        assert set(self.requests) - set(self.ends) == set(self.scheduler.request_ids)
        for sequence in waiting:
            assert not sequence.cross_block_ids
            assert not any(branch.block_ids for branch in sequence.branches)

    def finish(self, max_steps: int = 2000) -> None:
        """Runs until nothing is left to run, and checks every answer."""
        for _ in range(max_steps):
            if not self.scheduler.has_work and self.flight is None:
                break
            self.step()
        assert not self.scheduler.has_work, "somebody starves"
        assert self.blocks.num_free == self.blocks.num_blocks
        for number, request in self.requests.items():
            if number in self.ends:
                self.check_answer(request)

    def check_answer(self, request: Request) -> None:
        """All of the right answer if it ended by itself, else a beginning of it."""
        given, reason = self.given[request.request_id], self.ends[request.request_id]
        answer, natural = request.answer(self.scheduler.max_model_len)
        if reason in ("stop", "length"):
            assert (given, reason) == (answer, natural)
            if request.sampling.prompt_logprobs is not None and not request.output_ids:
                first = max(1, request.sampling.prompt_logprobs_start)
                expected = [TokenLogprobs(token, float(-i)) for i, token in enumerate(request.prompt_ids) if i >= first]
                assert self.prompt_logprobs.get(request.request_id, []) == expected
        else:
            assert given == answer[: len(given)]


@pytest.fixture
def make_service() -> Callable[..., Service]:
    return Service


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """`make_request(prompt_ids, max_tokens=..., ...)`: sampling fields and request fields by name."""
    numbers = iter(range(1_000_000))
    own = {
        "output_ids",
        "encoder_ids",
        "priority",
        "arrival",
        "deadline",
        "cache_salt",
        "adapter",
        "fails_at",
        "poisons",
    }

    def make(prompt_ids: list[int], **fields: Any) -> Request:
        number = next(numbers)
        mine = {name: value for name, value in fields.items() if name in own}
        mine.setdefault("arrival", float(number))
        sampling = {name: value for name, value in fields.items() if name not in own}
        return Request(number, list(prompt_ids), SamplingParams(**{"max_tokens": 8, **sampling}), **mine)

    return make
