"""From logits to the next ids: greedy, sampled, or candidates for a beam; with log-probabilities where asked.

Works on all rows at once; what no row asks for is not computed. A row's token depends on its own logits, parameters
and (seed, position) alone, never on its neighbours. `launch` queues the work, so that the tokens can feed the next
step before the host knows them; `collect` is the only place that waits for the device. Does not know blocks, text or
grammars (only their masks). Runs in the worker process.

Legend: R rows that sample, V vocabulary, G rows with a grammar.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Row, RowOutput, SamplingParams, TokenLogprobs
from model.candidates import Filters, largest, pick
from model.logits_rules import LogitsRules
from model.noise import seed_bits, uniforms
from model.transfer import HostCopy, on_device, upload


@dataclass(frozen=True, slots=True)
class Masks:
    """What grammars allow: bit t of `bits[g]` (int32 words, low bit first) is token t, for the row `rows[g]`."""

    rows: list[int]
    bits: NDArray[np.int32]  # [G, ceil(V / 32)]


@dataclass(slots=True)
class _Params:
    """The sampling parameters of one composition of the batch, as arrays over its rows."""

    rules: LogitsRules
    sampled: NDArray[np.int64]  # rows with a temperature
    beams: NDArray[np.int64]
    renormalized: NDArray[np.int64]  # those of the beams whose scores shall sum to 1 after all changes
    scored: NDArray[np.int64]  # rows that report log-probabilities
    max_scored: int
    max_beam: int
    temperature: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    filters: Filters


@dataclass(slots=True)
class Launched:
    """Results that the device may still be computing."""

    rows: Sequence[Row]
    params: _Params
    tokens: Tensor  # [R] int64, on the device
    results: HostCopy
    """tokens [R]; peaks [R], each row's largest logit, which tells whether the row is sound; then, each if asked for:
    the scored rows' log-probabilities, their best ids' [.., max_scored] and those ids, the beams' [.., max_beam] and
    theirs."""


class Sampler:
    """Keeps the parameters of the last batch's rows as tensors: most steps have the same rows as the one before."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._sampling: list[object] = []
        self._sequence_ids: list[int] = []
        self._params: _Params | None = None

    def sample(self, logits: Tensor, rows: Sequence[Row], masks: Masks | None = None) -> list[RowOutput]:
        return self.collect(self.launch(logits, rows, masks))

    def launch(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        masks: Masks | None = None,
        num_outputs: NDArray[np.int64] | None = None,
    ) -> Launched:
        """logits float32 [R, V], row i those of `rows[i]`; they are used up (changed in place).

        `num_outputs` [R] counts each row's ids so far, those included that `output_ids` does not hold yet.
        """
        params = self._params_of(rows, logits.device)
        if num_outputs is None:
            num_outputs = np.fromiter((len(row.output_ids) for row in rows), np.int64, len(rows))
        scores = None
        if len(params.scored):
            scores = torch.log_softmax(_rows(logits, params.scored), dim=1)
        if len(params.beams):
            beam_index = on_device(params.beams, logits.device)
            # As transformers does: processors act on log-probabilities.
            logits[beam_index] = torch.log_softmax(logits[beam_index], dim=1)
        if params.rules.any:
            params.rules.apply(logits, rows, num_outputs)
        if masks is not None and masks.rows:
            apply_masks(logits, masks)
        if len(params.renormalized):
            again = on_device(params.renormalized, logits.device)
            logits[again] = torch.log_softmax(logits[again], dim=1)
        beams = largest(_rows(logits, params.beams), params.max_beam) if len(params.beams) else ()
        tokens, peaks = _argmax(logits)
        if len(params.sampled):
            tokens = _sampled(params, logits, num_outputs, tokens, peaks)
        results = [tokens, peaks]
        if scores is not None:
            results.append(scores.gather(1, _rows(tokens, params.scored)[:, None])[:, 0])
            results += largest(scores, params.max_scored) if params.max_scored else ()
        return Launched(rows, params, tokens, HostCopy([*results, *beams]))

    def collect(self, launched: Launched) -> list[RowOutput]:
        """Waits for the device and says for every row its token, or its own fault."""
        params = launched.params
        results = [tensor.tolist() for tensor in launched.results.wait()]
        outputs = [
            RowOutput(row.sequence_id, token_id=token) if -np.inf < peak < np.inf else _fault(row, peak)
            for row, token, peak in zip(launched.rows, results[0], results[1], strict=True)
        ]
        results = results[2:]
        if len(params.scored):
            own, results = results[0], results[1:]
            values, ids = (results[0], results[1]) if params.max_scored else (None, None)
            results = results[2 if params.max_scored else 0 :]
            _add_logprobs(launched, own, values, ids, outputs)
        if len(params.beams):
            values, ids = results
            for place, row in enumerate(params.beams.tolist()):
                if outputs[row].error is None:
                    count = 2 * num_beams(launched.rows[row].sampling)
                    outputs[row].beam_candidates = list(zip(ids[place][:count], values[place][:count], strict=True))
        return outputs

    def _params_of(self, rows: Sequence[Row], device: torch.device) -> _Params:
        sampling = [row.sampling for row in rows]
        ids = [row.sequence_id for row in rows]
        same = self._params is not None and ids == self._sequence_ids
        if not same or any(a is not b for a, b in zip(sampling, self._sampling, strict=True)):
            before = self._params.rules if self._params is not None else None
            self._params = _make_params(rows, LogitsRules(rows, self.vocab_size, before), device)
            self._sampling, self._sequence_ids = list(sampling), ids
        assert self._params is not None
        return self._params


def _sampled(params: _Params, logits: Tensor, num_outputs: NDArray[np.int64], tokens: Tensor, peaks: Tensor) -> Tensor:
    """The rows' tokens [R], those of the rows with a temperature drawn; uses up the logits."""
    device = logits.device
    if len(params.sampled) < len(logits):
        logits, peaks = _rows(logits, params.sampled), _rows(peaks, params.sampled)
    positions = num_outputs[params.sampled].astype(np.uint64)
    noise, temperature = upload([uniforms(params.seeds, positions), params.temperature], device)
    # In place: another [R, V] costs more in page faults than the arithmetic.
    weights = logits.sub_(peaks[:, None]).div_(temperature[:, None]).exp_()
    drawn = pick(weights, noise, params.filters)
    return drawn if len(drawn) == len(tokens) else tokens.index_copy(0, on_device(params.sampled, device), drawn)


def apply_masks(logits: Tensor, masks: Masks) -> None:
    """Sets what the grammars forbid to -inf, in place; tokens past the masks' words are forbidden."""
    vocab_size = logits.shape[1]
    if logits.device.type != "cpu":
        words, rows = upload([masks.bits, np.array(masks.rows, np.int64)], logits.device)
        _apply_words(logits, words, rows)
        return
    bits = np.unpackbits(masks.bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    if bits.shape[1] < vocab_size:
        bits = np.pad(bits, ((0, 0), (0, vocab_size - bits.shape[1])))
    forbidden = torch.from_numpy(bits == 0)
    for place, row in enumerate(masks.rows):
        logits[row].masked_fill_(forbidden[place], -torch.inf)


def _apply_words(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    """The same by the device itself: words int32 [G, ceil(V / 32)] or fewer, rows int64 [G]."""
    vocab_size = logits.shape[1]
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((words[:, :, None] >> places) & 1).flatten(1)[:, :vocab_size] == 1  # [G, V]
    if allowed.shape[1] < vocab_size:
        allowed = torch.nn.functional.pad(allowed, (0, vocab_size - allowed.shape[1]))
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(~allowed, -torch.inf))


def score_tokens(logits: Tensor, targets: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `targets[i]` and of the `counts[i]` most likely ids, from raw logits [S, V]."""
    scores = torch.log_softmax(logits, dim=1)
    own = scores.gather(1, torch.tensor(targets, device=scores.device)[:, None])[:, 0].tolist()
    most = max(counts, default=0)
    top: list[tuple[list[float], list[int]]] = [([], [])] * len(targets)
    if most:
        values, ids = largest(scores, most)
        top = list(zip(values.tolist(), ids.tolist(), strict=True))
    return [
        TokenLogprobs(target, logprob, tuple(ids[:count]), tuple(values[:count]))
        for target, logprob, (values, ids), count in zip(targets, own, top, counts, strict=True)
    ]


def num_beams(params: SamplingParams) -> int:
    return params.beam.num_beams if params.beam is not None else 1


def _renormalizes(params: SamplingParams) -> bool:
    return params.beam is not None and params.beam.renormalize_logits


def _make_params(rows: Sequence[Row], rules: LogitsRules, device: torch.device) -> _Params:
    params = [row.sampling for row in rows]
    beams = [i for i, p in enumerate(params) if num_beams(p) > 1]
    sampled = [i for i, p in enumerate(params) if p.temperature > 0 and num_beams(p) == 1]
    scored = [i for i, p in enumerate(params) if p.logprobs is not None]
    top_k, top_p, min_p = upload(
        [
            np.array([max(params[i].top_k, 0) for i in sampled], np.int64),
            np.array([params[i].top_p for i in sampled], np.float64),
            np.array([params[i].min_p for i in sampled], np.float64),
        ],
        device,
    )
    return _Params(
        rules=rules,
        sampled=np.array(sampled, np.int64),
        beams=np.array(beams, np.int64),
        renormalized=np.array([i for i in beams if _renormalizes(params[i])], np.int64),
        scored=np.array(scored, np.int64),
        max_scored=max((params[i].logprobs or 0 for i in scored), default=0),
        max_beam=2 * max((num_beams(p) for p in params), default=0),
        temperature=np.array([params[i].temperature for i in sampled], np.float32),
        seeds=np.array([seed_bits(params[i].seed) for i in sampled], np.uint64),
        filters=Filters(top_k, top_p, min_p),
    )


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest id of the largest logit of each row, and that logit (NaN where the row has one)."""
    if logits.device.type == "cpu":
        # numpy's argmax is vectorised; torch's costs ten times as much on a CPU. Both stop at the first NaN.
        ids = torch.from_numpy(logits.numpy().argmax(axis=1))
        return ids, logits.gather(1, ids[:, None])[:, 0]
    peaks, ids = logits.max(dim=1)
    return ids, peaks


def _rows(values: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return values.index_select(0, on_device(rows, values.device))


def _fault(row: Row, peak: float) -> RowOutput:
    if peak == -np.inf:
        return RowOutput(row.sequence_id, error="no token is allowed here: bans and grammar leave none")
    return RowOutput(row.sequence_id, error="the model gave a logit that is not a finite number")


def _add_logprobs(
    launched: Launched,
    own: list[float],
    values: list[list[float]] | None,
    ids: list[list[int]] | None,
    outputs: list[RowOutput],
) -> None:
    for place, row in enumerate(launched.params.scored.tolist()):
        output, count = outputs[row], launched.rows[row].sampling.logprobs or 0
        if output.token_id is None:
            continue
        found = TokenLogprobs(output.token_id, own[place])
        if values is not None and ids is not None and count:
            found = TokenLogprobs(output.token_id, own[place], tuple(ids[place][:count]), tuple(values[place][:count]))
        output.logprobs = found
