"""Runs one step of a generating checkpoint: `Batch` in, `StepOutput` out.

`launch` builds the inputs, queues the forward pass and the sampling; `collect` waits for the results. A step may be
launched before the one before it is collected: its `fed` rows take their token on the device. Rows whose next token
hangs on what the host has yet to see (grammars, penalties) put the sampling off until `sample`. One row's fault (an id
outside the vocabulary, a failed grammar, a logit that is no number) is told in its own output and changes nothing for
the others. Knows neither requests nor blocks' owners nor text. Runs in the worker process, main thread.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.adapters.low_rank import AdapterWeights, StepAdapters, runs_of
from model.attention.attend import CachedAttend, CrossAttendPaged, PackedAttend
from model.attention.interface import AttentionBackend
from model.batch import Batch, Row, RowOutput, StepOutput, TokenLogprobs
from model.config import DecoderConfig, EncoderDecoderConfig
from model.cuda_graphs import DecodeGraphs, can_be_captured
from model.decoder import Decoder
from model.encoder_decoder import EncoderDecoder
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.sampling import Launched, Masks, Sampler, score_tokens
from model.step_inputs import Fed, StepInputs, cross_layout, make_inputs, make_source_inputs
from model.transfer import on_device, upload

GRAMMAR_FAULT = "grammar: "
"""How the error of a row begins whose grammar is at fault, not the model."""

SCORED_POSITIONS = 256
"""Prompt positions whose logits are held at once: bounds the memory that prompt log-probabilities take."""


@dataclass(slots=True)
class LaunchedStep:
    """A step whose results the device may still be computing."""

    rows: list[Row]
    errors: dict[int, str]
    """By place in `rows`."""
    sampled_places: list[int]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    started: float
    logits: Tensor | None = None
    """Those that are still to be sampled from."""
    sampled: Launched | None = None


class Runner:
    """One checkpoint on one device, with its paged cache. Backend and cache must be on the network's device."""

    def __init__(
        self,
        network: Decoder | EncoderDecoder,
        config: DecoderConfig | EncoderDecoderConfig,
        kv_cache: KVCache,
        backend: AttentionBackend,
        *,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.network = network
        self.config = config
        self.kv_cache = kv_cache
        self.backend = backend
        self.device = kv_cache.device
        self.grammars = grammars
        self.adapters: dict[int, AdapterWeights] = {}
        """Those that rows may name; steps of which none does are what they are without any."""
        self.forward_seconds = 0.0
        """What the last batch took, from its launch to its results."""
        self.draft_seconds = 0.0
        """How much of that was spent on guesses."""
        self._sampler = Sampler(config.vocab_size)
        self._tokens: Tensor | None = None
        """What the last step sampled, [R] on the device, and whose token is where in it."""
        self._token_places: dict[int, int] = {}
        self._collected = 0.0
        self._source_vocab_size = getattr(config, "source_vocab_size", None) or config.vocab_size
        self._graphs: DecodeGraphs | None = None
        if isinstance(network, Decoder) and self.device.type == "cuda" and can_be_captured(network):
            self._graphs = DecodeGraphs(network, kv_cache, backend, config.context_length)

    def run(self, batch: Batch) -> StepOutput:
        return self.collect(self.launch(batch))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> LaunchedStep:
        """Queues everything that the step computes. Raises what the device raises (out of memory)."""
        started = time.perf_counter()
        rows = batch.rows
        self.kv_cache.copy_blocks(batch.block_copies)
        inputs = make_inputs(rows, self.kv_cache.block_size)
        errors = _replace_foreign_ids(inputs.ids, inputs.query_starts, self.config.vocab_size, rows)
        hidden, logits = self._forward(rows, inputs, errors)
        places = [place for place, row in enumerate(rows) if row.samples]
        step = LaunchedStep(rows, errors, places, {}, started)
        if places:
            if logits is None:
                ends = _sampled_ends(inputs.row_ends, rows, places)
                picked = hidden if len(ends) == len(hidden) else hidden.index_select(0, on_device(ends, self.device))
                logits = self.network.logits(picked)
            elif len(places) < len(logits):
                logits = logits.index_select(0, on_device(np.array(places, np.int64), self.device))
            step.logits = logits
            if not any(row.fed and row.sampling.reads_outputs for row in rows):
                # The device computes while the grammars' masks are worked out here.
                self._sample(step, unseen=1)
        step.prompt_logprobs = self._score_prompts(rows, inputs, hidden)
        return step

    @torch.inference_mode()
    def sample(self, step: LaunchedStep) -> None:
        """Samples if `launch` has put it off: the step before is collected, and its tokens are in `output_ids`."""
        if step.logits is not None:
            self._sample(step, unseen=0)

    def _sample(self, step: LaunchedStep, *, unseen: int) -> None:
        """`unseen`: how many ids of a fed row are not in its `output_ids` yet."""
        assert step.logits is not None
        rows = step.rows
        if len(step.sampled_places) < len(rows):
            rows = [rows[place] for place in step.sampled_places]
        num_outputs = np.fromiter((len(row.output_ids) + unseen * row.fed for row in rows), np.int64, len(rows))
        masks = self._masks(step.rows, step.sampled_places, step.errors)
        if any(row.num_drafted for row in rows):
            rows, num_outputs, masks = _behind_drafts(rows, num_outputs, masks)
        step.sampled = self._sampler.launch(step.logits, rows, masks, num_outputs)
        step.logits = None
        self._tokens = step.sampled.tokens
        self._token_places = {row.sequence_id: place for place, row in enumerate(rows)}

    @torch.inference_mode()
    def collect(self, step: LaunchedStep) -> StepOutput:
        """Waits for a launched step; one output for each row, in order."""
        outputs = [RowOutput(row.sequence_id) for row in step.rows]
        assert step.logits is None, "a step that is not sampled yet"
        if step.sampled is not None:
            sampled = iter(self._sampler.collect(step.sampled))
            for place in step.sampled_places:
                row = step.rows[place]
                outputs[place] = next(sampled)
                if row.num_drafted:
                    behind = list(islice(sampled, row.num_drafted))
                    outputs[place].following = _confirmed(outputs[place], row.token_ids[-row.num_drafted :], behind)
        for place, scores in step.prompt_logprobs.items():
            outputs[place].prompt_logprobs = scores
        for place in step.sampled_places:
            row, output = step.rows[place], outputs[place]
            if row.sampling.grammar is not None and output.token_id is not None and place not in step.errors:
                self._advance_grammar(row, output)
        for place, error in step.errors.items():
            outputs[place] = RowOutput(step.rows[place].sequence_id, error=error)
        # A step launched ahead begins, for the device, when the one before it ends.
        now = time.perf_counter()
        self.forward_seconds = now - max(step.started, self._collected)
        self._collected = now
        return StepOutput(rows=outputs)

    def recover(self) -> None:
        """After a step that raised: forgets what was kept between steps and gives unused memory back.

        Raises where the fault stays with the device (a kernel's assertion): nothing can be computed any more.
        """
        self._sampler = Sampler(self.config.vocab_size)
        self._tokens = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _forward(self, rows: Sequence[Row], inputs: StepInputs, errors: dict[int, str]) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, E] of the step's tokens, whose keys and values are in the cache afterwards; and logits
        [T, V] where a captured step has made them."""
        if isinstance(self.network, Decoder):
            adapters = self._adapters_of(rows, inputs)
            if self._graphs is not None and adapters is None and inputs.decodes_only and self._graphs.fits(inputs):
                return self._graphs.run(inputs, self._fed(rows))
            attend = CachedAttend(self.kv_cache, inputs.layout(self.device), self.backend)
            return self.network(*self._ids_and_positions(rows, inputs), attend, adapters), None
        self._encode_sources(rows, errors)
        attend = CachedAttend(self.kv_cache, inputs.layout(self.device), self.backend)
        cross = CrossAttendPaged(self.kv_cache, cross_layout(rows, inputs.query_starts, self.device), self.backend)
        return self.network.decode(*self._ids_and_positions(rows, inputs), attend, cross), None

    def _adapters_of(self, rows: Sequence[Row], inputs: StepInputs) -> StepAdapters | None:
        """None where no row has one."""
        if all(row.adapter is None for row in rows):
            return None
        weights = [None if row.adapter is None else self.adapters[row.adapter] for row in rows]
        return StepAdapters(runs_of(weights, inputs.query_starts.tolist()))

    def _fed(self, rows: Sequence[Row]) -> Fed | None:
        """The rows that take their token on the device."""
        places = [place for place, row in enumerate(rows) if row.fed]
        if not places:
            return None
        assert self._tokens is not None, "a row is fed by a step that sampled nothing"
        sources = [self._token_places[rows[place].sequence_id] for place in places]
        return Fed(np.array(places, np.int64), np.array(sources, np.int64), self._tokens)

    def _ids_and_positions(self, rows: Sequence[Row], inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """[T] each; the ids of fed rows are put in their places on the device."""
        fed = self._fed(rows)
        if fed is None:
            ids, positions = upload([inputs.ids, inputs.positions], self.device)
            return ids, positions
        ids, positions, targets, sources = upload(
            [inputs.ids, inputs.positions, inputs.query_starts[fed.places], fed.sources], self.device
        )
        ids.index_copy_(0, targets, fed.tokens.index_select(0, sources))
        return ids, positions

    def _encode_sources(self, rows: Sequence[Row], errors: dict[int, str]) -> None:
        """Encodes the sources of the rows that ask for it and stores their cross-attention keys and values."""
        assert isinstance(self.network, EncoderDecoder)
        places = [place for place, row in enumerate(rows) if row.encode]
        errors.update({place: "there is no source to look at" for place, row in enumerate(rows) if not row.encoder_ids})
        if not places:
            return
        inputs = make_source_inputs([rows[place] for place in places], self.kv_cache.block_size)
        foreign = _replace_foreign_ids(inputs.ids, inputs.starts, self._source_vocab_size)
        errors.update({places[place]: error for place, error in foreign.items()})
        attend = PackedAttend(inputs.layout(self.device), self.backend)
        ids, positions, slots = upload([inputs.ids, inputs.positions, inputs.slots], self.device)
        hidden = self.network.encode(ids, positions, attend)
        for layer, (key, value) in enumerate(self.network.cross_keys_values(hidden)):
            keys, values = self.kv_cache.keys[layer], self.kv_cache.values[layer]
            self.backend.write(key, value, keys, values, slots, self.network.cross_rules)

    def _score_prompts(self, rows: Sequence[Row], inputs: StepInputs, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """For the rows that ask: log-probabilities of the prompt tokens that this step's tokens predict."""
        places = [place for place, row in enumerate(rows) if row.sampling.prompt_logprobs is not None]
        found: dict[int, list[TokenLogprobs]] = {}
        for place in places:
            row = rows[place]
            begin = max(row.start + 1, row.sampling.first_scored)
            first = int(inputs.query_starts[place]) + begin - row.start - 1
            targets = row.prompt_ids[begin : row.start + len(row.token_ids) + 1]
            scores: list[TokenLogprobs] = []
            for start in range(0, len(targets), SCORED_POSITIONS):
                piece = targets[start : start + SCORED_POSITIONS]
                logits = self.network.logits(hidden[first + start : first + start + len(piece)])
                scores += score_tokens(logits, piece, [row.sampling.prompt_logprobs or 0] * len(piece))
            found[place] = scores
        return found

    def _masks(self, rows: Sequence[Row], places: list[int], errors: dict[int, str]) -> Masks | None:
        """Which tokens the rows' grammars allow; a grammar that fails is noted in `errors`."""
        constrained = [i for i, place in enumerate(places) if rows[place].sampling.grammar is not None]
        if not constrained:
            return None
        bits = np.full((len(constrained), -(-self.config.vocab_size // 32)), -1, np.int32)
        for index, i in enumerate(constrained):
            row = rows[places[i]]
            if row.fed and self.grammars is not None and self.grammars.matcher(row.sequence_id) is None:
                continue  # it has ended since the step was made
            error = self.grammars.fill_mask(row, bits[index]) if self.grammars else "this checkpoint takes none"
            if error is not None:
                errors[places[i]] = f"{GRAMMAR_FAULT}{error}"
        return Masks(constrained, bits)

    def _advance_grammar(self, row: Row, output: RowOutput) -> None:
        assert self.grammars is not None
        assert output.token_id is not None
        matcher = self.grammars.matcher(row.sequence_id)
        if matcher is None:
            return  # it has ended since the step was made
        error = matcher.advance(output.token_id)
        output.error = None if error is None else f"{GRAMMAR_FAULT}{error}"
        output.grammar_finished = matcher.finished


def _sampled_ends(row_ends: NDArray[np.int64], rows: Sequence[Row], places: list[int]) -> NDArray[np.int64]:
    """Where in the step the tokens lie behind which one is sampled: the last known ones, each before its drafts."""
    ends = row_ends[places]
    counts = np.array([rows[place].num_drafted for place in places])
    if not counts.any():
        return ends
    return np.concatenate([np.arange(end - count, end + 1) for end, count in zip(ends, counts, strict=True)])


def _behind_drafts(
    rows: Sequence[Row], num_outputs: NDArray[np.int64], masks: Masks | None
) -> tuple[list[Row], NDArray[np.int64], Masks | None]:
    """Each row once more for each of its drafts, with so many outputs more; the masks stay with their rows."""
    counts = np.array([1 + row.num_drafted for row in rows])
    firsts = counts.cumsum() - counts
    repeated = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(repeated)) - firsts[repeated]
    if masks is not None:
        masks = Masks(firsts[masks.rows].tolist(), masks.bits)
    return [rows[place] for place in repeated.tolist()], num_outputs[repeated] + nth, masks


def _confirmed(first: RowOutput, drafted: list[int], behind: list[RowOutput]) -> list[RowOutput]:
    """Of what was sampled behind each drafted token: as much as follows from what was sampled before it."""
    kept, previous = [], first
    for guess, output in zip(drafted, behind, strict=True):
        if previous.token_id != guess or output.error is not None:
            break
        kept.append(output)
        previous = output
    return kept


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step failed for want of memory, on whichever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _replace_foreign_ids(
    ids: NDArray[np.int64], starts: NDArray[np.int64], vocab_size: int, rows: Sequence[Row] = ()
) -> dict[int, str]:
    """Ids outside the vocabulary become 0, in place, so that the step can run; gives the faults of their rows. A draft
    is no fault (a source may have a vocabulary of its own): it is never what is sampled."""
    foreign = (ids < 0) | (ids >= vocab_size)
    if not foreign.any():
        return {}
    errors: dict[int, str] = {}
    for token in np.flatnonzero(foreign).tolist():
        row = int(np.searchsorted(starts, token, side="right")) - 1
        if rows and token >= starts[row + 1] - rows[row].num_drafted:
            continue
        errors.setdefault(row, f"token id {int(ids[token])} is not in the vocabulary of {vocab_size:,}")
    ids[foreign] = 0
    return errors
