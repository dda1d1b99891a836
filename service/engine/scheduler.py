"""The scheduler of one checkpoint that generates: requests come and go, steps are made, results find their requests.

It has no clock, thread or I/O: time is an argument; and it knows neither tensors nor text nor the wire, except that
what it delivers is the message that goes out. How a step is made of the requests is in `planner`. Runs in the worker
process.
"""

from collections import deque
from itertools import count

from model.batch import Batch, FinishReason, RowOutput, StepOutput, TokenLogprobs
from model.block_manager import BlockManager
from service.engine.beam_search import BeamSearch
from service.engine.deadlines import Deadlines
from service.engine.planner import SchedulerLimits, StepPlanner
from service.engine.protocol import Blame, TokenOutput
from service.engine.refusals import fault_of_ids, refusal
from service.engine.rows import Step
from service.engine.sequence import Branch, Phase, Sequence

__all__ = ["Scheduler", "SchedulerLimits"]


class Scheduler:
    """`add`, `cancel`, `expire`, then for each step `schedule` and one of `update` and `fail_step`.

    The next step may be made before the results of the last one are there, if it `can_look_ahead`: its rows go on from
    tokens that nobody knows yet, and what turns out not to have been wanted is dropped.
    """

    def __init__(self, block_manager: BlockManager, limits: SchedulerLimits) -> None:
        self._blocks = block_manager
        self._planner = StepPlanner(block_manager, limits)
        self._placement = self._planner.placement
        self.max_model_len = min(limits.max_model_len, self._placement.capacity * block_manager.block_size)
        """The longest prompt and output together: the model's limit or what the whole cache holds."""
        self._sequences: dict[int, Sequence] = {}
        self._compiling: dict[int, Sequence] = {}
        """Those that wait for their grammar."""
        self._deadlines = Deadlines()
        self._beam_rows = count(-1, -1)
        self._in_flight: deque[Step] = deque()
        """Steps made whose results are awaited, the oldest first: one, or two for a moment when looking ahead."""
        self._num_confirmed = 0

    # --- gauges

    @property
    def num_running(self) -> int:
        return len(self._planner.running)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks, those that wait for their grammar included."""
        return len(self._sequences) - len(self._planner.running)

    @property
    def next_step_tokens(self) -> int:
        return self._planner.next_step_tokens

    @property
    def num_preempted(self) -> int:
        """Preemptions for want of room in the last step made."""
        return self._planner.step.num_preempted

    @property
    def num_confirmed(self) -> int:
        """Drafted tokens that turned out to be right, in the results last taken."""
        return self._num_confirmed

    @property
    def kv_cache_usage(self) -> float:
        return self._blocks.usage

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of a step at the most, as things stand."""
        return self._planner.max_batch_tokens

    @property
    def request_ids(self) -> list[int]:
        """Requests that are here, running or waiting."""
        return list(self._sequences)

    def request_ids_of(self, adapter: int) -> list[int]:
        return [number for number, sequence in self._sequences.items() if sequence.adapter == adapter]

    @property
    def step_request_ids(self) -> set[int]:
        """Requests that have a part in the step last made."""
        return {sequence.request_id for sequence, _ in self._planner.step.entries}

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would give rows."""
        return self._planner.has_work

    @property
    def can_look_ahead(self) -> bool:
        """Whether `schedule` may be called while a step's results are awaited."""
        return self._planner.can_look_ahead

    # --- requests come and go

    def add(self, sequence: Sequence, now: float) -> TokenOutput | None:
        """Takes a request in; an output comes back at once if it cannot run, or if nothing is left to do.

        A request with `sampling.grammar` is not run before `grammar_ready`.
        """
        assert sequence.request_id not in self._sequences, f"request {sequence.request_id} is here already"
        fault = fault_of_ids(sequence)
        if fault is None:
            self._prepare(sequence)
            fault = refusal(sequence, self._placement, self.max_model_len, self._planner.max_sequences)
        if fault is not None:
            sequence.phase = Phase.finished
            return TokenOutput(
                request_id=sequence.request_id, finish_reason="error", error=fault.message, blame=fault.blame
            )
        reason = self._finish_reason(sequence) or ("deadline" if _is_past(sequence.deadline, now) else None)
        if reason is not None:
            sequence.phase = Phase.finished
            return TokenOutput(request_id=sequence.request_id, finish_reason=reason)
        self._sequences[sequence.request_id] = sequence
        if sequence.deadline is not None:
            self._deadlines.add(sequence.request_id, sequence.deadline)
        if sequence.sampling.grammar is not None:
            sequence.phase = Phase.compiling
            self._compiling[sequence.request_id] = sequence
        else:
            self._planner.enter(sequence)
        return None

    def _prepare(self, sequence: Sequence) -> None:
        """Fills in what follows from the request and the limits."""
        sampling = sequence.sampling
        sequence.max_output = max(0, min(sampling.max_tokens, self.max_model_len - len(sequence.prompt_ids)))
        row_id = sequence.request_id
        if sampling.beam is not None and sampling.beam.num_beams > 1:
            # Nothing of a beam search is delivered before its end, so a replayed one starts from its beginning.
            sequence.output_ids = []
            sequence.width = sampling.beam.num_beams
            row_id = next(self._beam_rows)
            if sequence.max_output > 0:
                sequence.beam = BeamSearch(sampling.beam, eos_ids=sampling.stop_ids, max_tokens=sequence.max_output)
        root = self._placement.root(sequence)
        sequence.branches = [Branch(row_id, sequence.prompt_ids, sequence.output_ids, root)]

    def grammar_ready(self, request_id: int) -> None:
        sequence = self._compiling.pop(request_id, None)
        if sequence is not None:
            self._planner.enter(sequence)

    def grammar_failed(self, request_id: int, error: str) -> TokenOutput | None:
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, "error", error, "grammar") if sequence is not None else None

    def cancel(self, request_id: int) -> TokenOutput | None:
        """Ends a request and frees its blocks; None if it has ended already."""
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, "cancelled") if sequence is not None else None

    def expire(self, now: float) -> list[TokenOutput]:
        """Ends the requests whose deadline has passed, wherever they are."""
        due = self._deadlines.take_due(now)
        return [self._finish(self._sequences[number], "deadline") for number in due]

    # --- a step

    def schedule(self, now: float) -> Batch:
        """Makes the next step; a batch without rows if there is nothing to run."""
        assert len(self._in_flight) < 2, "results of the step before the last one are still awaited"
        step = self._planner.plan(now)
        if step.batch.rows:
            self._in_flight.append(step)
        return step.batch

    def update(self, batch: Batch, output: StepOutput, now: float) -> list[TokenOutput]:
        """Takes the results of the oldest batch in flight; says what each request gets of them.

        A request that stopped by an id gets that id too, as the last of its `token_ids`. One whose deadline passed
        while the step ran still gets what the step gave it.
        """
        if not batch.rows:
            return self.expire(now)
        step = self._in_flight.popleft()
        self._num_confirmed = 0
        assert batch is step.batch, "results of a step that is not the oldest in flight"
        outputs = {row.sequence_id: row for row in output.rows}
        delivered: list[TokenOutput] = []
        beams: dict[int, list[RowOutput]] = {}
        for row, (sequence, branch) in zip(batch.rows, step.entries, strict=True):
            if sequence.phase is not Phase.running:
                continue
            branch.num_pending -= row.samples
            found = outputs.get(row.sequence_id)
            error = "the step gave no result for the request" if found is None else found.error
            if found is None or error is not None:
                self._placement.forget(sequence)
                delivered.append(self._finish(sequence, "error", error))
                continue
            if found.prompt_logprobs and sequence.wants_prompt_logprobs:
                self._gather_prompt_logprobs(sequence, row.start, found)
            if not row.samples:
                continue
            if sequence.beam is not None:
                beams.setdefault(sequence.request_id, []).append(found)
            else:
                delivered.append(self._take_tokens(sequence, found, row.num_drafted))
        for request_id, rows in beams.items():
            delivered += self._take_candidates(request_id, rows)
        self._planner.clear_suspects(step)
        late = {ended.request_id: ended for ended in self.expire(now)}
        for entry in delivered if late else ():
            if entry.request_id in late:
                entry.finish_reason = late.pop(entry.request_id).finish_reason
        delivered += late.values()
        return delivered

    def record(self, batch: Batch, seconds: float, draft_seconds: float = 0.0) -> None:
        """Learns from what the batch took, and the guesses in it, how large the next ones may be."""
        self._planner.record(batch, seconds, draft_seconds)

    def awaits(self, batch: Batch) -> bool:
        """Whether the batch's results are still wanted: those of one made after a step that failed are not."""
        return any(step.batch is batch for step in self._in_flight)

    def fail_step(self, batch: Batch, error: str, *, out_of_memory: bool = False) -> list[TokenOutput]:
        """The oldest step in flight raised: a request that was in it alone fails, several are tried in ever smaller
        groups; if it was memory that they lacked, and none of them lacks it apart from the others, steps are smaller
        from then on.

        Nothing that the step, or one made after it, should have written is relied on: all requests that run are
        computed again, with the help of what earlier steps left in the cache.
        """
        if not batch.rows:
            return []
        assert batch is self._in_flight[0].batch, "failure of a step that is not the oldest in flight"
        members = {sequence.request_id: sequence for sequence, _ in self._in_flight[0].entries}
        for step in self._in_flight:
            self._planner.forget_step(step)
        self._in_flight.clear()
        if len(members) > 1:
            self._planner.suspect_running(batch.num_tokens if out_of_memory else 0)
            return []
        ended = [self._finish(entry, "error", error) for entry in members.values() if entry.phase is Phase.running]
        self._planner.convict_running()
        return ended

    def _gather_prompt_logprobs(self, sequence: Sequence, start: int, found: RowOutput) -> None:
        """Appends the chunk's log-probabilities, less those that were there before a preemption."""
        assert found.prompt_logprobs is not None
        first = sequence.sampling.first_scored
        num_known = first + len(sequence.prompt_logprobs) - max(start + 1, first)
        sequence.prompt_logprobs += found.prompt_logprobs[num_known:]

    def _take_tokens(self, sequence: Sequence, found: RowOutput, num_drafted: int) -> TokenOutput:
        """The token that a step has sampled, and those behind drafts that were right; up to one that ends it."""
        if sequence.max_output == 0:
            return self._finish(sequence, "length")
        branch = sequence.branches[0]
        branch.num_computed += len(found.following)
        self._num_confirmed += len(found.following)
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        reason: FinishReason | None = None
        for result in (found, *found.following):
            assert result.token_id is not None
            token_ids.append(result.token_id)
            if result.logprobs is not None:
                logprobs.append(result.logprobs)
            sequence.output_ids.append(result.token_id)
            reason = "stop" if result.grammar_finished else self._finish_reason(sequence)
            if reason is not None:
                break
            self._placement.fill_late(branch)
        if sequence.drafts is not None:
            sequence.drafts.learn(token_ids, num_drafted)
        if num_drafted:
            self._placement.give_back_room(branch)
        output = self._output(sequence) if reason is None else self._finish(sequence, reason)
        output.token_ids += token_ids
        output.logprobs += logprobs
        return output

    def _take_candidates(self, request_id: int, rows: list[RowOutput]) -> list[TokenOutput]:
        """Moves a beam search on by one token; it delivers nothing before its end."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        search, parents = sequence.beam, sequence.branches
        assert search is not None
        assert len(rows) == len(parents)
        next_rows = search.advance([row.beam_candidates or [] for row in rows])
        if search.is_done:
            output = self._finish(sequence, search.finish_reason)
            output.token_ids = search.best
            return [output]
        self._placement.branch(sequence, [(row, token_id, next(self._beam_rows)) for row, token_id in next_rows])
        return []

    @staticmethod
    def _finish_reason(sequence: Sequence) -> FinishReason | None:
        """Whether its known ids are all that it may have; before `min_tokens` the sampler gives no stop id."""
        sampling, output_ids = sequence.sampling, sequence.output_ids
        if output_ids and output_ids[-1] in sampling.stop_ids:
            return "stop"
        if len(output_ids) < sequence.max_output or (sequence.max_output == 0 and sampling.prompt_logprobs is not None):
            return None
        return "length"

    def _finish(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, blame: Blame | None = None
    ) -> TokenOutput:
        """Ends a request, wherever it is; its blocks are free at once."""
        output = self._output(sequence)
        self._planner.leave(sequence)
        self._compiling.pop(sequence.request_id, None)
        self._deadlines.discard(sequence.request_id)
        sequence.phase = Phase.finished
        del self._sequences[sequence.request_id]
        output.finish_reason = reason
        output.error, output.blame = error, blame
        return output

    @staticmethod
    def _output(sequence: Sequence) -> TokenOutput:
        output = TokenOutput(request_id=sequence.request_id, num_cached_tokens=sequence.num_cached_tokens)
        if not sequence.delivered and sequence.started is not None:
            output.prompt_logprobs = sequence.prompt_logprobs
            sequence.delivered = True
        return output


def _is_past(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
