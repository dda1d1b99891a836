"""What one step of generation takes and gives: plain data, defined by the layer that consumes it.

The scheduler fills a `Batch`, the runner turns it into a `StepOutput`. Nothing here knows tensors, text, HTTP or time.
Runs in the worker process; `SamplingParams` is also built in the API process and travels with a request.
"""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the generated text; `text` is a JSON schema, a regular expression or a Lark grammar."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""
    frame: str = ""
    """What stands around the constrained text: a Lark grammar in which `@answer` is its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """Beam search as `transformers` defines it (`GenerationConfig`); present only on encoder-decoder requests."""

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    renormalize_logits: bool = False
    """Whether log-probabilities are made to sum to 1 again after bans and penalties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is continued. Every default means "off"; `temperature == 0` means greedy."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    """Ids that end the sequence (end of text included, unless the caller asked to ignore it)."""
    logprobs: int | None = None
    """Alternatives to report for each sampled token; 0 reports the sampled token alone."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    prompt_logprobs_start: int = 0
    """The first prompt token that is reported: what lies before its predecessor may come from the cache."""
    grammar: Grammar | None = None
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    """The same of n-grams of the source."""
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None
    suppressed_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] = ()
    """If there are any, no other id is sampled."""
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    """The last id of each is not sampled behind the others."""
    beam: BeamParams | None = None

    @property
    def first_scored(self) -> int:
        """The index of the first prompt token with a log-probability: the very first token has none."""
        return max(1, self.prompt_logprobs_start)

    @property
    def reads_outputs(self) -> bool:
        """Whether choosing a token takes the values of those before it, and not only their number."""
        return (
            self.grammar is not None
            or self.no_repeat_ngram_size > 0
            or self.encoder_no_repeat_ngram_size > 0
            or any(len(ids) > 1 for ids in self.banned_sequences)
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature: the token's own, and the most likely ids."""

    token_id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class Row:
    """One sequence's part in a step: `token_ids` are computed at `start`, `start + 1`, ...

    Worked example, blocks of 4: a prompt of 6 ids in chunks of 4 gives in its second step `token_ids` = the last two,
    `start` = 4, `block_ids` = [7, 2]; its keys and values are written to slots 2 * 4 + 0 and 2 * 4 + 1, and it attends
    to positions 0..5, read from blocks 7 and 2.
    """

    sequence_id: int
    token_ids: list[int]
    start: int
    block_ids: list[int]
    sampling: SamplingParams
    samples: bool
    """Whether this step reaches the sequence's last known token, so that a next token is sampled."""
    output_ids: list[int]
    """Ids sampled so far (owned by the scheduler; not to be mutated): penalties read them, their count is the
    position that the sampling noise is drawn for."""
    prompt_ids: list[int]
    cross_block_ids: list[int] = field(default_factory=list)
    """Encoder-decoder: where the cross-attention keys and values of the encoder's output lie."""
    encoder_ids: list[int] = field(default_factory=list)
    """Encoder-decoder: the source text; encoded in the step with `encode` set, and only counted afterwards."""
    encode: bool = False
    fed: bool = False
    """Its one token is what the step before this one samples for the sequence; `token_ids` holds a place for it."""
    adapter: int | None = None
    """Which of the runner's adapters it is computed with, a number above 0."""
    num_drafted: int = 0
    """How many of `token_ids`, the last ones, are guesses at what follows the known one; each has a token sampled."""
    draft_ids: list[int] = field(default_factory=list)
    """Known ids that the draft network computes in this step, at `draft_start`, `draft_start + 1`, ...; where there are
    guesses, too, `token_ids` holds places for them, and it is the draft network that makes them, behind these."""
    draft_start: int = 0


@dataclass(slots=True)
class Batch:
    """The rows of a step, and the copies of partly filled blocks (source, target) to make before it (beam forks)."""

    rows: list[Row]
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) + (len(row.encoder_ids) if row.encode else 0) for row in self.rows)


@dataclass(slots=True)
class RowOutput:
    """What the runner found for a row: `token_id` where the row samples (None if not), or the row's own fault."""

    sequence_id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For the positions of this step's tokens that predict a known next prompt token."""
    beam_candidates: list[tuple[int, float]] | None = None
    """Beam search: the best 2 * num_beams (token id, log-probability) continuations of this row."""
    grammar_finished: bool = False
    """The grammar allows nothing further: the sequence is complete."""
    error: str | None = None
    following: "list[RowOutput]" = field(default_factory=list)
    """What was sampled behind drafted tokens that `token_id`, and those before each, have turned out to be."""


@dataclass(slots=True)
class StepOutput:
    rows: list[RowOutput]
