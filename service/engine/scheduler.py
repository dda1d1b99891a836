"""Which tokens of which requests are computed in the next step, and what the step's results mean for each request.

A request has known tokens and computed tokens; every step spends a budget of tokens on closing the gap. It has no
clock, thread or I/O: time is an argument; and it knows neither tensors nor text nor the wire, except that what it
delivers is the message that goes out. Runs in the worker process, one for each checkpoint that generates.

Order: by `priority` (higher first), then by arrival. A request is admitted with all blocks of its known tokens, and
when memory runs out the least urgent one gives its blocks back, to be computed again later.
"""

from bisect import insort
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from operator import attrgetter

from model.batch import Batch, FinishReason, Row, RowOutput, StepOutput
from model.block_manager import BlockManager
from service.engine.beam_search import BeamSearch
from service.engine.placement import Placement
from service.engine.protocol import TokenOutput
from service.engine.sequence import Branch, Phase, Sequence
from service.engine.trials import Trials
from service.engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`max_batch_tokens` per step, `max_sequences` rows per step, `prefill_chunk` tokens of one row per step."""

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    prefill_chunk: int | None = None


@dataclass(slots=True)
class _Step:
    """The step being made, and once made the one whose results are awaited."""

    number: int = 0
    batch: Batch = field(default_factory=lambda: Batch(rows=[]))
    entries: list[tuple[Sequence, Branch]] = field(default_factory=list)
    """Who each row of the batch belongs to."""
    budget: int = 0
    reserved: int = 0
    """Tokens of the budget kept for running requests that have not had their turn: one for each of their rows."""


class Scheduler:
    """`add`, `cancel`, `expire`, then for each step `schedule` and one of `update` and `fail_step`."""

    def __init__(self, block_manager: BlockManager, limits: SchedulerLimits) -> None:
        self._placement = Placement(block_manager)
        self._blocks = block_manager
        capacity = self._placement.capacity
        self.max_model_len = min(limits.max_model_len, capacity * block_manager.block_size)
        """The longest prompt and output together: the model's limit or what the whole cache holds."""
        self._max_batch_tokens = limits.max_batch_tokens
        self._max_sequences = min(limits.max_sequences, limits.max_batch_tokens)
        self._prefill_chunk = min(limits.prefill_chunk or limits.max_batch_tokens, limits.max_batch_tokens)
        self._watermark = max(1, capacity // 20)
        self._sequences: dict[int, Sequence] = {}
        self._waiting = WaitingQueue()
        self._trials = Trials()
        self._running: list[Sequence] = []
        """Those that hold blocks, most urgent first."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._step = _Step()
        self._num_rows = 0
        self._paused_last = False
        self._beam_rows = count(-1, -1)
        self._ticket = count()
        self.num_waiting_tokens = 0
        self.num_preempted = 0
        """Preemptions for want of memory in the last step made."""

    # --- gauges

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks, those that wait for their grammar included."""
        return len(self._sequences) - len(self._running)

    @property
    def kv_cache_usage(self) -> float:
        return self._blocks.usage

    @property
    def request_ids(self) -> list[int]:
        """Requests that are here, running or waiting."""
        return list(self._sequences)

    @property
    def step_request_ids(self) -> set[int]:
        """Requests that have a part in the step last made."""
        return {sequence.request_id for sequence, _ in self._step.entries}

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would give rows."""
        return bool(self._running) or self._trials.has_waiting or self._waiting.head() is not None

    # --- requests come and go

    def add(self, sequence: Sequence, now: float) -> TokenOutput | None:
        """Takes a request in; an output comes back at once if it cannot run, or if nothing is left to do.

        A request with `sampling.grammar` is not run before `grammar_ready`.
        """
        assert sequence.request_id not in self._sequences, f"request {sequence.request_id} is here already"
        self._prepare(sequence)
        refusal = self._refusal(sequence)
        if refusal is not None:
            sequence.phase = Phase.finished
            return TokenOutput(request_id=sequence.request_id, finish_reason="error", error=refusal)
        reason = self._finish_reason(sequence) or ("deadline" if _is_past(sequence.deadline, now) else None)
        if reason is not None:
            sequence.phase = Phase.finished
            return TokenOutput(request_id=sequence.request_id, finish_reason=reason)
        self._sequences[sequence.request_id] = sequence
        self.num_waiting_tokens += sequence.num_tokens
        if sequence.deadline is not None:
            heappush(self._deadlines, (sequence.deadline, next(self._ticket), sequence))
        if sequence.sampling.grammar is not None:
            sequence.phase = Phase.compiling
        else:
            sequence.phase = Phase.waiting
            self._waiting.push(sequence)
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

    def _refusal(self, sequence: Sequence) -> str | None:
        """Why it could not run even alone."""
        num_prompt, max_tokens = len(sequence.prompt_ids), sequence.sampling.max_tokens
        if num_prompt == 0:
            return "the prompt has no tokens"
        limit = self.max_model_len - (1 if max_tokens > 0 else 0)
        if num_prompt > limit:
            return f"the prompt has {num_prompt:,} tokens; the limit is {limit:,}"
        if sequence.width > self._max_sequences:
            return f"{sequence.width} beams are asked for; the limit is {self._max_sequences} rows in a step"
        num_blocks = self._placement.max_blocks(sequence, min(num_prompt + max_tokens, self.max_model_len))
        if num_blocks > self._placement.capacity:
            size = self._blocks.block_size
            return (
                f"the request may need {num_blocks * size:,} tokens of KV cache ({len(sequence.encoder_ids):,} "
                f"encoded, {num_prompt:,} prompt, up to {max_tokens:,} output, times {sequence.width}); "
                f"the cache holds {self._placement.capacity * size:,}"
            )
        return None

    def grammar_ready(self, request_id: int) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.phase is Phase.compiling:
            sequence.phase = Phase.waiting
            self._waiting.push(sequence)

    def grammar_failed(self, request_id: int, error: str) -> TokenOutput | None:
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, "error", error) if sequence is not None else None

    def cancel(self, request_id: int) -> TokenOutput | None:
        """Ends a request and frees its blocks; None if it has ended already."""
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, "cancelled") if sequence is not None else None

    def expire(self, now: float) -> list[TokenOutput]:
        """Ends the requests whose deadline has passed, wherever they are."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heappop(self._deadlines)
            if sequence.phase is not Phase.finished:
                expired.append(self._finish(sequence, "deadline"))
        return expired

    # --- a step begins

    def schedule(self, now: float) -> Batch:
        """Makes the next step; a batch without rows if there is nothing to run."""
        if not self._running:
            self._trials.close_empty()
        self._placement.begin_step()
        self.num_preempted = 0
        self._step = _Step(self._step.number + 1, budget=self._max_batch_tokens, reserved=self._num_rows)
        if not self._schedule_long_source(now):
            self._schedule_all(now)
        return self._step.batch

    def _schedule_all(self, now: float) -> None:
        """Goes through the running requests, most urgent first, and lets waiting ones in at their rank."""
        step, running, queue = self._step, self._running, self._queue
        position = 0
        head = queue.head()
        while True:
            current = running[position] if position < len(running) else None
            if head is not None and (current is None or head.priority > current.priority):
                admitted = self._admit(head, position, now)
                position += admitted
                head = queue.head() if admitted else None
            elif current is None:
                return
            else:
                num_preempted = self.num_preempted
                step.reserved -= current.width
                position += self._run(current)
                if head is not None and self.num_preempted > num_preempted:
                    head = queue.head()

    def _schedule_long_source(self, now: float) -> bool:
        """Runs an encoder pass that leaves no tokens to the running requests in a step of its own, now and then."""
        head = self._queue.head()
        paused_last, self._paused_last = self._paused_last and bool(self._running), False
        if paused_last or head is None or not head.encoder_ids or self._placement.has_source(head):
            return False
        cost = len(head.encoder_ids) + head.width
        if cost + self._num_rows <= self._max_batch_tokens:
            return False
        step = self._step
        step.budget, step.reserved = max(step.budget, cost), 0
        self._paused_last = self._admit(head, 0, now)
        if not self._paused_last:
            step.budget, step.reserved = self._max_batch_tokens, self._num_rows
        return self._paused_last

    @property
    def _queue(self) -> WaitingQueue:
        return self._trials.active or self._waiting

    def _admit(self, head: Sequence, position: int, now: float) -> bool:
        """Places the head of the queue and adds its rows; those running from `position` on have had no turn yet, and
        the less urgent of them give way. False closes admission for this step: nobody overtakes."""
        step = self._step
        if head.preempted_in == step.number:
            return False
        cost = head.width
        if head.encoder_ids and not self._placement.has_source(head):
            cost += len(head.encoder_ids)
        while True:
            if cost > step.budget - step.reserved:
                return False
            num_rows = self._num_rows + head.width
            # Alone it must fit; among others it leaves them and itself room for a block each.
            reserve = min(num_rows, self._watermark) if self._running else 0
            if num_rows <= self._max_sequences and self._placement.place(head, reserve):
                break
            if position == len(self._running) or self._running[-1].priority >= head.priority:
                return False
            step.reserved -= self._running[-1].width
            self._preempt(self._running[-1])
        self._start(head, now)
        self._add_rows(head, step.budget - step.reserved)
        return True

    def _start(self, sequence: Sequence, now: float) -> None:
        self._queue.pop()
        sequence.phase = Phase.running
        insort(self._running, sequence, key=attrgetter("urgency"))
        self._num_rows += sequence.width
        self.num_waiting_tokens -= sequence.num_tokens
        if sequence.started is None:
            sequence.started = now
            sequence.num_cached_tokens = sequence.branches[0].num_computed

    def _run(self, sequence: Sequence) -> bool:
        """Adds the rows of a running request; False if it had to give way itself."""
        branch = sequence.branches[0]
        start = branch.num_computed
        size = self._blocks.block_size
        # The usual case, cheaply: one token more, in a block that it has.
        if (
            sequence.beam is None
            and start + 1 == len(branch.prompt_ids) + len(branch.output_ids)
            and start < len(branch.block_ids) * size
        ):
            self._add_row(sequence, branch, 1, False)
            return True
        if not self._make_room(sequence):
            return False
        self._add_rows(sequence, self._step.budget - self._step.reserved)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Sees to the blocks of its next step, if need be from the least urgent; False if that was itself."""
        needed = self._placement.num_blocks_to_step(sequence)
        while needed > self._blocks.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            self._step.reserved -= victim.width
        if needed:
            self._step.batch.block_copies += self._placement.prepare_step(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        sequence.preempted_in = self._step.number
        self._running.remove(sequence)
        self._release(sequence)
        self._queue.push(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Frees the blocks of a request that has left the running ones, to be computed again."""
        self._placement.remove(sequence)
        self._num_rows -= sequence.width
        self.num_waiting_tokens += sequence.num_tokens
        sequence.phase = Phase.waiting

    def _add_rows(self, sequence: Sequence, available: int) -> None:
        """Adds its rows to the batch, with at most `available` tokens, the source's included."""
        step = self._step
        branches = sequence.branches
        encode = bool(sequence.encoder_ids) and not sequence.encoded
        if encode:
            sequence.encoded = True
            self._placement.fill_source(sequence)
            available -= len(sequence.encoder_ids)
            step.budget -= len(sequence.encoder_ids)
        share = min(self._prefill_chunk, available // len(branches))
        # Branches sample together: none takes its last token before all can.
        complete = max([self._gap(sequence, branch) for branch in branches]) <= share
        for branch in branches:
            # Looked at once more: the branch before may fill, in this step, what this one needs.
            gap = self._gap(sequence, branch)
            length = min(gap, share) if complete else min(gap - 1, share)
            if length > 0:
                self._add_row(sequence, branch, length, encode)
                encode = False
        assert not encode

    def _gap(self, sequence: Sequence, branch: Branch) -> int:
        """Tokens to compute, after what other rows have computed in the meantime."""
        gap = branch.num_tokens - branch.num_computed
        if gap > 1:
            skipped = self._placement.catch_up(sequence, branch)
            gap -= skipped
            if not sequence.delivered:
                sequence.num_cached_tokens += skipped
        return gap

    def _add_row(self, sequence: Sequence, branch: Branch, length: int, encode: bool) -> None:
        step = self._step
        start = branch.num_computed
        end = start + length
        size = self._blocks.block_size
        if start // size < end // size:
            self._placement.fill(branch, start, end)
        prompt_ids, output_ids = branch.prompt_ids, branch.output_ids
        samples = end == len(prompt_ids) + len(output_ids)
        step.batch.rows.append(
            Row(
                branch.row_id,
                [output_ids[-1]] if samples and length == 1 and output_ids else branch.tokens(start, end),
                start,
                branch.block_ids,
                sequence.sampling,
                samples,
                output_ids,
                prompt_ids,
                sequence.cross_block_ids,
                sequence.encoder_ids,
                encode,
            )
        )
        step.entries.append((sequence, branch))
        step.budget -= length

    # --- a step ends

    def update(self, batch: Batch, output: StepOutput, now: float) -> list[TokenOutput]:
        """Takes the results of the batch last made; says what each request gets of them.

        A request that stopped by an id gets that id too, as the last of its `token_ids`. One whose deadline passed
        while the step ran still gets what the step gave it.
        """
        assert batch is self._step.batch, "results of a step that is not the last one made"
        outputs = {row.sequence_id: row for row in output.rows}
        delivered: list[TokenOutput] = []
        beams: dict[int, list[RowOutput]] = {}
        for row, (sequence, branch) in zip(batch.rows, self._step.entries, strict=True):
            if sequence.phase is not Phase.running:
                continue
            found = outputs.get(row.sequence_id)
            error = "the step gave no result for the request" if found is None else found.error
            if found is None or error is not None:
                self._placement.forget(sequence)
                delivered.append(self._finish(sequence, "error", error))
                continue
            branch.num_computed = row.start + len(row.token_ids)
            if found.prompt_logprobs and sequence.wants_prompt_logprobs:
                self._gather_prompt_logprobs(sequence, row.start, found)
            if not row.samples:
                continue
            if sequence.beam is not None:
                beams.setdefault(sequence.request_id, []).append(found)
            else:
                delivered.append(self._take_token(sequence, found))
        for request_id, rows in beams.items():
            delivered += self._take_candidates(request_id, rows)
        if self._trials.active is not None:
            self._clear_suspects()
        if self._deadlines and self._deadlines[0][0] <= now:
            late = {output.request_id: output for output in self.expire(now)}
            for entry in delivered:
                if entry.request_id in late:
                    entry.finish_reason = late.pop(entry.request_id).finish_reason
            delivered += late.values()
        return delivered

    def fail_step(self, batch: Batch, error: str) -> list[TokenOutput]:
        """The step raised: a request that was in it alone fails, several are tried in ever smaller groups.

        Nothing that the step should have written is relied on: all its requests are computed again, with the help of
        what earlier steps left in the cache.
        """
        assert batch is self._step.batch, "failure of a step that is not the last one made"
        self._placement.forget_step()
        members = list(dict.fromkeys(sequence for sequence, _ in self._step.entries))
        suspects = [sequence for sequence in members if sequence.phase is Phase.running]
        if len(members) == 1:
            return [self._finish(sequence, "error", error) for sequence in suspects]
        queue = self._queue
        running, self._running = self._running, []
        for sequence in running:
            self._release(sequence)
            if sequence not in suspects:
                queue.push(sequence)
        self._trials.begin(suspects)
        return []

    def _clear_suspects(self) -> None:
        """Lets requests go that got through a step to its end while on trial."""
        for row, (sequence, _) in zip(self._step.batch.rows, self._step.entries, strict=True):
            if row.samples and sequence.phase is Phase.running:
                self._running.remove(sequence)
                self._release(sequence)
                self._waiting.push(sequence)

    def _gather_prompt_logprobs(self, sequence: Sequence, start: int, found: RowOutput) -> None:
        """Appends the chunk's log-probabilities, less those that were there before a preemption."""
        assert found.prompt_logprobs is not None
        sequence.prompt_logprobs += found.prompt_logprobs[len(sequence.prompt_logprobs) - start :]

    def _take_token(self, sequence: Sequence, found: RowOutput) -> TokenOutput:
        if sequence.max_output == 0:
            return self._finish(sequence, "length")
        token_id = found.token_id
        assert token_id is not None
        sequence.output_ids.append(token_id)
        reason: FinishReason | None = "stop" if found.grammar_finished else self._finish_reason(sequence)
        output = self._output(sequence) if reason is None else self._finish(sequence, reason)
        output.token_ids.append(token_id)
        if found.logprobs is not None:
            output.logprobs.append(found.logprobs)
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
        heirs: dict[int, Branch] = {}
        sequence.branches = []
        for index, token_id in next_rows:
            parent = parents[index]
            child = Branch(next(self._beam_rows), parent.prompt_ids, [*parent.output_ids, token_id], parent.root)
            child.chain = parent.chain.copy()
            child.num_computed = parent.num_computed
            heir = heirs.setdefault(index, child)
            if heir is child:
                child.block_ids, parent.block_ids = parent.block_ids, []
            else:
                child.fork_of = heir
            sequence.branches.append(child)
        for parent in parents:
            self._placement.remove_branch(parent)
        return []

    @staticmethod
    def _finish_reason(sequence: Sequence) -> FinishReason | None:
        """Whether its known ids are all that it may have."""
        sampling, output_ids = sequence.sampling, sequence.output_ids
        num_output = len(output_ids)
        if num_output and output_ids[-1] in sampling.stop_ids and num_output > sampling.min_tokens:
            return "stop"
        if num_output < sequence.max_output or (sequence.max_output == 0 and sampling.prompt_logprobs is not None):
            return None
        return "length"

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> TokenOutput:
        """Ends a request, wherever it is; its blocks are free at once."""
        output = self._output(sequence)
        if sequence.phase is Phase.running:
            self._running.remove(sequence)
            self._release(sequence)
        self.num_waiting_tokens -= sequence.num_tokens
        sequence.phase = Phase.finished
        del self._sequences[sequence.request_id]
        output.finish_reason = reason
        output.error = error
        return output

    @staticmethod
    def _output(sequence: Sequence) -> TokenOutput:
        output = TokenOutput(request_id=sequence.request_id, num_cached_tokens=sequence.num_cached_tokens)
        if not sequence.delivered and sequence.started is not None:
            output.started = sequence.started
            output.prompt_logprobs = sequence.prompt_logprobs
            sequence.delivered = True
        return output


def _is_past(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
