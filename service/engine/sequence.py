"""The state of one generating request in the scheduler: its tokens, how far they are computed, where its K/V lie.

Knows nothing of budgets, of other requests or of time. A `Branch` is one line of tokens with keys and values of its
own: a request has one, a beam search up to `num_beams`. Runs in the worker process.
"""

from dataclasses import dataclass, field
from enum import Enum

from model.batch import SamplingParams, TokenLogprobs
from service.engine.beam_search import BeamSearch
from service.engine.drafts import Record
from service.engine.protocol import Generate


class Phase(Enum):
    """Where a request is: `compiling` waits for its grammar, `waiting` for room, `running` holds blocks."""

    compiling = 1
    waiting = 2
    running = 3
    finished = 4


@dataclass(slots=True, eq=False)
class Branch:
    """Prompt and output ids, of which the first `num_computed` have keys and values in `block_ids`.

    What a step computes counts as computed once the step is made.
    """

    row_id: int
    prompt_ids: list[int]
    output_ids: list[int]
    root: bytes
    """What the chain starts from: whatever else than its tokens decides its keys and values."""
    block_ids: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    """Digests of the leading full blocks of known tokens, as far as they were needed; outlives preemption."""
    num_computed: int = 0
    num_pending: int = 0
    """Tokens that steps in flight sample: they count as known, but only the device knows them yet."""
    num_drafted: int = 0
    """How many of its tokens, the first ones, the draft network has computed; those behind `num_computed` are guesses
    that were wrong."""
    fork_of: "Branch | None" = None
    """A beam's child whose blocks are not made yet: the sibling that went on with their parent's blocks."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    def tokens(self, start: int, end: int) -> list[int]:
        """The known ids at positions start .. end - 1."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:] + self.output_ids[: end - num_prompt]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request. The scheduler is the only writer of everything below `adapter`."""

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    encoder_ids: list[int] = field(default_factory=list)
    priority: int = 0
    """A higher value is more urgent."""
    arrival: float = 0.0
    deadline: float | None = None
    cache_salt: str = ""
    adapter: int | None = None
    """Which of the lane's adapters it is computed with."""

    phase: Phase = Phase.waiting
    branches: list[Branch] = field(default_factory=list)
    beam: BeamSearch | None = None
    width: int = 1
    """Rows that it may take in a step."""
    max_output: int = 0
    """Output ids that it may come to have, by `max_tokens` and by the longest text."""
    cross_block_ids: list[int] = field(default_factory=list)
    cross_chain: list[bytes] = field(default_factory=list)
    encoded: bool = False
    """Whether the cross-attention blocks are filled, at the latest by the step being made."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Gathered over the prompt's chunks, delivered with the first token."""
    num_cached_tokens: int = 0
    started: float | None = None
    delivered: bool = False
    drafts: Record | None = None
    """How guesses at its next tokens fared, where they may be made."""
    urgency: tuple[int, float, int] = field(init=False)
    """Sorts the most urgent first: by priority, then first come, first served."""

    def __post_init__(self) -> None:
        self.urgency = (-self.priority, self.arrival, self.request_id)

    @property
    def num_tokens(self) -> int:
        """What it brings to a queue: ids to encode, and known ids to compute."""
        return len(self.encoder_ids) + len(self.prompt_ids) + len(self.output_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None and not self.delivered and not self.output_ids

    @property
    def may_be_guessed(self) -> bool:
        """Whether guesses at its tokens are of use: those that sampling reads must be known."""
        last = self.max_output - 1
        return self.beam is None and not self.sampling.reads_outputs and len(self.output_ids) < last

    @property
    def max_cached_tokens(self) -> int | None:
        """How many leading tokens may come from the cache: prompt log-probabilities need the logits behind the rest."""
        if not self.wants_prompt_logprobs:
            return None
        return self.sampling.first_scored - 1 + len(self.prompt_logprobs)


def sequence_from(message: Generate, adapter: int | None = None) -> Sequence:
    """The state of a request that has just come in; `output_ids` are those delivered before a worker died. `adapter` is
    what the lane calls the one that the message names."""
    return Sequence(
        request_id=message.request_id,
        prompt_ids=message.prompt_ids,
        sampling=message.sampling,
        output_ids=list(message.output_ids),
        encoder_ids=message.encoder_ids,
        priority=message.priority,
        arrival=message.arrival,
        deadline=message.deadline,
        cache_salt=message.cache_salt,
        adapter=adapter,
    )
