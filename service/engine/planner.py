"""One step made: which waiting requests come in, and who gives way for memory.

A request has known tokens and computed tokens; the step spends a budget of tokens on closing the gap (how many of whom
is in `rows`), a smaller one beside requests that decode (`step_costs`). Order: by `priority` (higher first), then by
arrival. A request is admitted with all blocks of its known tokens, and when memory runs out the least urgent one gives
its blocks back, to be computed again later. Knows nothing of results, deadlines or messages; time is an argument. Runs
in the worker process.
"""

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from model.batch import Batch
from model.block_manager import BlockManager
from service.engine.guesser import Guesser
from service.engine.placement import Placement
from service.engine.rows import RowMaker, Step
from service.engine.sequence import Phase, Sequence
from service.engine.step_costs import StepCosts
from service.engine.trials import Trials
from service.engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`max_batch_tokens` per step, `max_sequences` rows per step, `prefill_chunk` tokens of one row per step;
    `max_step_stretch`: how many times as long as without prompts, and with all requests decoding, a step may take in
    which requests decode; `speculative_tokens`: how many of a request's next tokens may be guessed and checked in one
    step; `draft_len`: the context of the network that guesses them, None where they are read off the request's own
    text."""

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    prefill_chunk: int | None = None
    max_step_stretch: float | None = None
    speculative_tokens: int = 0
    draft_len: int | None = None


MIN_BATCH_TOKENS = 32
"""Steps that memory is too short for are made smaller, but not smaller than this."""
MIN_PROMPT_TOKENS = 16
"""Prompts get on by so many tokens in each step, whatever decodes beside them."""


class StepPlanner:
    """Holds the requests that wait for blocks and those that have them, and makes a step of them by `plan`."""

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits) -> None:
        self.placement = Placement(blocks)
        self.max_sequences = min(limits.max_sequences, limits.max_batch_tokens)
        self._blocks = blocks
        self.max_batch_tokens = limits.max_batch_tokens
        self._costs = StepCosts()
        self._max_step_stretch = limits.max_step_stretch
        self._weighs_steps = limits.max_step_stretch is not None or limits.speculative_tokens > 0
        """Whether anything hangs on what steps cost."""
        self._watermark = max(1, self.placement.capacity // 20)
        self._guesser = Guesser(
            self.placement,
            self._costs,
            limits.speculative_tokens,
            draft_len=limits.draft_len,
            watermark=self._watermark,
        )
        chunk = limits.prefill_chunk or limits.max_batch_tokens
        self._rows = RowMaker(self.placement, chunk, self._guesser.progress)
        self._waiting = WaitingQueue()
        self._trials = Trials()
        self.running: list[Sequence] = []
        """Those that hold blocks, most urgent first."""
        self.step = Step()
        self.num_waiting_tokens = 0
        self._num_rows = 0
        self._paused_last = False

    @property
    def has_work(self) -> bool:
        """Whether `plan` would give rows."""
        return bool(self.running) or self._trials.has_waiting or self._waiting.head() is not None

    @property
    def next_step_tokens(self) -> int:
        """About how many tokens the next step computes: what is left to do, as far as it fits into one."""
        branches = [branch for sequence in self.running for branch in sequence.branches]
        num_left = self.num_waiting_tokens + sum([branch.num_tokens - branch.num_computed for branch in branches])
        head = self._queue.head()
        num_undivided = len(head.encoder_ids) + head.width if head is not None else 0
        return min(num_left, max(self.max_batch_tokens, num_undivided))

    @property
    def can_look_ahead(self) -> bool:
        """Whether the next step can be made while the results of the last one are still unknown: nobody in it has to
        see them first, and nobody will have to give way, which would lose what is on its way."""
        if self._trials.active is not None or self._guesser.most:
            return False
        head = self._waiting.head()
        if head is not None and self.running and head.priority > self.running[-1].priority:
            return False
        num_needed = 0
        for sequence in self.running:
            if sequence.beam is not None or sequence.wants_prompt_logprobs:
                return False
            num_needed += self.placement.num_blocks_to_step(sequence)
        return num_needed <= self._blocks.num_free

    def enter(self, sequence: Sequence) -> None:
        """Queues a request that can run."""
        sequence.phase = Phase.waiting
        self.num_waiting_tokens += sequence.num_tokens
        self._waiting.push(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Lets go of a request that ends; its blocks are free at once."""
        if sequence.phase is Phase.running:
            self.running.remove(sequence)
            self._release(sequence)
        if sequence.phase is Phase.waiting:
            self.num_waiting_tokens -= sequence.num_tokens

    def plan(self, now: float) -> Step:
        """Makes the next step; one without rows if there is nothing to run."""
        if not self.running:
            self._shrink(self._trials.close_empty())
        num_decoding, has_prompts = self._composition()
        budget = self._budget(num_decoding) if has_prompts else self.max_batch_tokens
        self.step = Step(budget=budget, reserved=self._num_rows)
        self.step.filled = self.placement.begin_step()
        # Beside prompts there is enough to compute.
        alone = num_decoding > 0 and not has_prompts and self._trials.active is None
        self._guesser.begin_step(self.step, self.running if alone else [])
        if not self._plan_long_source(now):
            self._plan_all(now)
        self.step.group_by_adapter()
        return self.step

    def _composition(self) -> tuple[int, bool]:
        """How many requests decode, and whether there are prompts beside them; nothing where that is of no use."""
        if not self._weighs_steps:
            return 0, False
        branches = [sequence.branches[0] for sequence in self.running]
        num_decoding = sum(branch.num_computed + 1 == branch.num_tokens for branch in branches)
        return num_decoding, num_decoding < len(branches) or self._queue.head() is not None

    def _budget(self, num_decoding: int) -> int:
        """Tokens of a step with prompts: no more of these than the requests that decode beside them can bear."""
        if num_decoding == 0 or self._max_step_stretch is None:
            return self.max_batch_tokens
        num_here = min(len(self.running) + len(self._queue), self.max_sequences)
        num_prompt_tokens = self._costs.num_prompt_tokens(num_decoding, num_here, self._max_step_stretch)
        return min(self.max_batch_tokens, self._num_rows + max(num_prompt_tokens, MIN_PROMPT_TOKENS))

    # --- after a step

    def forget_step(self, step: Step) -> None:
        """The step failed: nothing that it should have written is relied on."""
        self.placement.forget_step(step.filled)
        self._guesser.forget_step(step)

    def record(self, batch: Batch, seconds: float, draft_seconds: float = 0.0) -> None:
        """Learns from what a step took, and guesses in it; what a draft takes for prompts is part of their price."""
        if not self._weighs_steps:
            return
        num_decoding = sum([1 + row.num_drafted for row in batch.rows if len(row.token_ids) == 1 + row.num_drafted])
        num_prompt_tokens = batch.num_tokens - num_decoding
        if draft_seconds and not num_prompt_tokens:
            self._guesser.record(batch, draft_seconds)
            seconds -= draft_seconds
        self._costs.record(num_decoding, num_prompt_tokens, seconds)

    def suspect_running(self, too_many_tokens: int = 0) -> None:
        """The step failed: its requests, and all others that run, are tried apart from each other from now on.

        `too_many_tokens`: how many the step had, where there was no memory for it. If nobody turns out to be at fault,
        steps are smaller from then on.
        """
        suspects, self.running = self.running, []
        for sequence in suspects:
            self._release(sequence)
        self._trials.begin(suspects, too_many_tokens)

    def convict_running(self) -> None:
        """The step failed, and it is known whose fault it was: the others are computed again."""
        self._trials.convict()
        for sequence in self.running:
            self._release(sequence)
            self._queue.push(sequence)
        self.running = []

    def clear_suspects(self, step: Step) -> None:
        """Lets requests back to the others that got through the step to its end while on trial."""
        if self._trials.active is None:
            return
        for row, (sequence, _) in zip(step.batch.rows, step.entries, strict=True):
            if row.samples and sequence.phase is Phase.running:
                self.running.remove(sequence)
                self._release(sequence)
                self._waiting.push(sequence)

    def _shrink(self, too_many_tokens: int) -> None:
        if too_many_tokens:
            smaller = max(too_many_tokens * 3 // 4, MIN_BATCH_TOKENS)
            self.max_batch_tokens = min(self.max_batch_tokens, smaller)
            self.max_sequences = min(self.max_sequences, self.max_batch_tokens)

    # --- who takes part

    @property
    def _queue(self) -> WaitingQueue:
        return self._trials.active or self._waiting

    def _plan_all(self, now: float) -> None:
        """Goes through the running requests, most urgent first, and lets waiting ones in at their rank."""
        step, running, queue = self.step, self.running, self._queue
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
                num_preempted = step.num_preempted
                step.reserved -= current.width
                position += self._run(current)
                if head is not None and step.num_preempted > num_preempted:
                    head = queue.head()

    def _plan_long_source(self, now: float) -> bool:
        """Runs an encoder pass that leaves no tokens to the running requests in a step of its own, now and then."""
        head = self._queue.head()
        paused_last, self._paused_last = self._paused_last and bool(self.running), False
        if paused_last or head is None or not head.encoder_ids or self.placement.has_source(head):
            return False
        cost = len(head.encoder_ids) + head.width
        step = self.step
        budget = step.budget
        if cost + self._num_rows <= budget:
            return False
        step.budget, step.reserved = max(budget, cost), 0
        self._paused_last = self._admit(head, 0, now)
        if not self._paused_last:
            step.budget, step.reserved = budget, self._num_rows
        return self._paused_last

    def _admit(self, head: Sequence, position: int, now: float) -> bool:
        """Places the head of the queue and adds its rows; those running from `position` on have had no turn yet, and
        the less urgent of them give way. False closes admission for this step: nobody overtakes."""
        step = self.step
        cost = head.width
        if head.encoder_ids and not self.placement.has_source(head):
            cost += len(head.encoder_ids)
        while True:
            if cost > step.budget - step.reserved:
                return False
            num_rows = self._num_rows + head.width
            # Alone it must fit; among others it leaves them and itself room for a block each.
            reserve = min(num_rows, self._watermark) if self.running else 0
            if num_rows <= self.max_sequences and self.placement.place(head, reserve):
                break
            if position == len(self.running) or self.running[-1].priority >= head.priority:
                return False
            step.reserved -= self.running[-1].width
            self._preempt(self.running[-1])
        self._start(head, now)
        self._rows.add(step, head, step.budget - step.reserved)
        return True

    def _start(self, sequence: Sequence, now: float) -> None:
        self._queue.pop()
        sequence.phase = Phase.running
        insort(self.running, sequence, key=attrgetter("urgency"))
        self._num_rows += sequence.width
        self.num_waiting_tokens -= sequence.num_tokens
        if sequence.started is None:
            sequence.started = now
            sequence.num_cached_tokens = min(sequence.branches[0].num_computed, len(sequence.prompt_ids))

    def _run(self, sequence: Sequence) -> bool:
        """Adds the rows of a running request; False if it had to give way itself."""
        branch = sequence.branches[0]
        if branch.num_pending and len(branch.output_ids) + branch.num_pending >= sequence.max_output:
            return True  # the last token that it may have is on its way
        start = branch.num_computed
        size = self._blocks.block_size
        decodes = sequence.beam is None and start + 1 == branch.num_tokens
        # The usual case, cheaply: one token more, in a block that it has.
        if not (decodes and start < len(branch.block_ids) * size) and not self._make_room(sequence):
            return False
        if decodes:
            self._rows.add_next(self.step, sequence, branch, self._guesser.guess(self.step, sequence, branch))
        else:
            self._rows.add(self.step, sequence, self.step.budget - self.step.reserved)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Sees to the blocks of its next step, if need be from the least urgent; False if that was itself."""
        needed = self.placement.num_blocks_to_step(sequence)
        while needed > self._blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            self.step.reserved -= victim.width
        if needed:
            self.step.batch.block_copies += self.placement.prepare_step(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.step.num_preempted += 1
        self.running.remove(sequence)
        self._release(sequence)
        self._queue.push(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Frees the blocks of a request that has left the running ones, to be computed again."""
        self.placement.remove(sequence)
        self._num_rows -= sequence.width
        self.num_waiting_tokens += sequence.num_tokens
        sequence.phase = Phase.waiting
