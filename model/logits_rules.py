"""What requests change in the logits before a token is chosen: biases, penalties, bans and forced tokens.

Worked out once per composition of the batch into flat index arrays, so that a step costs a few indexed writes and
nothing at all for what no row asks. Formulas and order are those of `transformers`' logits processors and, for the
presence and frequency penalties, of OpenAI's API. Does not choose tokens. Runs in the worker process.

Legend: R rows, V vocabulary, U different ids that a row has seen.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Row
from model.transfer import on_device, upload

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class LogitsRules:
    """The rules of a fixed list of rows. `apply` is called once per step, with the rows' current state."""

    def __init__(self, rows: Sequence[Row], vocab_size: int, previous: "LogitsRules | None" = None) -> None:
        params = [row.sampling for row in rows]
        self._vocab_size = vocab_size
        bias = [(i, id_, value) for i, p in enumerate(params) for id_, value in p.logit_bias.items()]
        self._bias = _Entries([(i, id_) for i, id_, _ in bias], vocab_size)
        self._bias_values = np.array([b[2] for b in bias], np.float32)[self._bias.kept]
        self._suppressed = _Entries([(i, id_) for i, p in enumerate(params) for id_ in p.suppressed_ids], vocab_size)
        early = [(i, id_) for i, p in enumerate(params) if p.min_tokens > 0 for id_ in p.stop_ids]
        self._early_stops = _Entries(early, vocab_size)
        self._min_tokens = np.array([p.min_tokens for p in params], np.int64)
        self._max_tokens = np.array([p.max_tokens for p in params], np.int64)
        self._forced_first = _Entries(
            [(i, p.forced_bos_id) for i, p in enumerate(params) if p.forced_bos_id is not None], vocab_size
        )
        self._forced_last = _Entries(
            [(i, p.forced_eos_id) for i, p in enumerate(params) if p.forced_eos_id is not None], vocab_size
        )
        self._ngrams = [i for i, p in enumerate(params) if p.no_repeat_ngram_size or p.encoder_no_repeat_ngram_size]
        self._banned = [i for i, p in enumerate(params) if p.banned_sequences]
        self._allowed = [(i, _inside(p.allowed_ids, vocab_size)) for i, p in enumerate(params) if p.allowed_ids]
        before = previous._penalties if previous is not None else None
        self._penalties: _Penalties | None = _Penalties.of(rows, before)
        self.any = bool(
            len(self._bias.rows)
            or len(self._suppressed.rows)
            or len(self._early_stops.rows)
            or len(self._forced_first.rows)
            or len(self._forced_last.rows)
            or self._ngrams
            or self._banned
            or self._allowed
            or self._penalties is not None
        )

    def apply(self, logits: Tensor, rows: Sequence[Row], num_outputs: Ints) -> None:
        """Changes logits [R, V] in place; `num_outputs` [R] counts the ids that each row has sampled."""
        device = logits.device
        if len(self._bias.rows):
            values = on_device(self._bias_values, device)
            logits.index_put_(self._bias.index(device), values, accumulate=True)
        if self._penalties is not None:
            self._penalties.apply(logits, rows, num_outputs)
        for i in self._ngrams:
            banned = _repeats(rows[i])
            logits[i, on_device(banned[banned < self._vocab_size], device)] = -torch.inf
        for i in self._banned:
            ends = _inside(sequence_ends(rows[i], rows[i].sampling.banned_sequences), self._vocab_size)
            logits[i, on_device(ends, device)] = -torch.inf
        for i, allowed in self._allowed:
            index = on_device(allowed, device)
            kept = logits[i, index]
            logits[i] = -torch.inf
            logits[i, index] = kept
        stops = self._early_stops
        if len(stops.rows):
            active = num_outputs[stops.rows] < self._min_tokens[stops.rows]
            logits[stops.index(device, active)] = -torch.inf
        for forced, now in (
            (self._forced_first, num_outputs == 0),
            (self._forced_last, num_outputs == self._max_tokens - 1),
        ):
            if len(forced.rows) and (active := now[forced.rows]).any():
                row_index, ids = forced.index(device, active)
                logits[row_index] = -torch.inf
                logits[row_index, ids] = 0.0
        if len(self._suppressed.rows):
            logits[self._suppressed.index(device)] = -torch.inf


class _Entries:
    """Flat (row, id) pairs of the ids inside the vocabulary; `kept` says which of the given pairs these are."""

    def __init__(self, pairs: list[tuple[int, int]], vocab_size: int) -> None:
        found = np.array(pairs, np.int64).reshape(-1, 2)
        self.kept = (found[:, 1] >= 0) & (found[:, 1] < vocab_size)
        self.rows: Ints = found[self.kept, 0]
        self.ids: Ints = found[self.kept, 1]

    def index(self, device: torch.device, active: NDArray[np.bool_] | None = None) -> tuple[Tensor, Tensor]:
        rows, ids = (self.rows, self.ids) if active is None else (self.rows[active], self.ids[active])
        row_index, id_index = upload([rows, ids], device)
        return row_index, id_index


class _Penalties:
    """Repetition, presence and frequency penalties of the rows that have any.

    Per row the different ids seen in prompt and output, and how often each is in the output alone; a step adds its one
    new id.
    """

    def __init__(self, rows: Sequence[Row], indices: list[int]) -> None:
        params = [rows[i].sampling for i in indices]
        self.indices = np.array(indices, np.int64)
        self.sequence_ids = [rows[i].sequence_id for i in indices]
        self.repetition = np.array([p.repetition_penalty for p in params], np.float32)[:, None]
        self.presence = np.array([p.presence_penalty for p in params], np.float32)[:, None]
        self.frequency = np.array([p.frequency_penalty for p in params], np.float32)[:, None]
        self.ids: Ints = np.zeros((len(indices), 0), np.int64)  # [R, U]
        self.counts: Floats = np.zeros((len(indices), 0), np.float32)  # [R, U]
        self.lens: Ints = np.zeros(len(indices), np.int64)
        self.num_seen: Ints = np.full(len(indices), -1)

    @classmethod
    def of(cls, rows: Sequence[Row], previous: "_Penalties | None") -> "_Penalties | None":
        indices = [
            i
            for i, row in enumerate(rows)
            if row.sampling.repetition_penalty != 1.0
            or row.sampling.presence_penalty != 0.0
            or row.sampling.frequency_penalty != 0.0
        ]
        if not indices:
            return None
        made = cls(rows, indices)
        if previous is not None:
            made._take_over(previous)
        return made

    def apply(self, logits: Tensor, rows: Sequence[Row], num_outputs: Ints) -> None:
        self._catch_up(rows, num_outputs[self.indices])
        device, longest = logits.device, int(self.lens.max())
        # Past its own ids a row repeats its first one: written the same value twice, whatever the order of the writes.
        own = np.arange(longest) < self.lens[:, None]
        seen = [np.where(own, values[:, :longest], values[:, :1]) for values in (self.ids, self.counts)]
        rates = [self.repetition, self.presence, self.frequency]
        row_index, ids, counts, repetition, presence, frequency = upload([self.indices[:, None], *seen, *rates], device)
        scores = logits[row_index, ids]  # [R, U]
        scores = torch.where(scores > 0, scores / repetition, scores * repetition)  # arXiv 1909.05858, section 4.1
        scores -= frequency * counts + presence * (counts > 0)
        logits[row_index, ids] = scores

    def _take_over(self, previous: "_Penalties") -> None:
        """What another composition of the batch already knew about sequences that are still here."""
        place = {sequence_id: i for i, sequence_id in enumerate(previous.sequence_ids)}
        old = np.array([place.get(sequence_id, -1) for sequence_id in self.sequence_ids])
        known = old >= 0
        self._reserve(previous.ids.shape[1])
        self.ids[known] = previous.ids[old[known]]
        self.counts[known] = previous.counts[old[known]]
        self.lens[known] = previous.lens[old[known]]
        self.num_seen[known] = previous.num_seen[old[known]]

    def _catch_up(self, rows: Sequence[Row], num_outputs: Ints) -> None:
        step_behind = (self.num_seen == num_outputs - 1) & (self.num_seen >= 0)
        for i in np.flatnonzero(~step_behind & (self.num_seen != num_outputs)):
            self._count(int(i), rows[self.indices[i]])
        if not step_behind.any():
            return
        self._reserve(int(self.lens.max()) + 1)
        behind = np.flatnonzero(step_behind)
        new = np.array([rows[i].output_ids[-1] for i in self.indices[behind]], np.int64)[:, None]
        places = np.arange(self.ids.shape[1])
        same = (self.ids[behind] == new) & (places < self.lens[behind, None])
        fresh = ~same.any(axis=1)
        same[fresh] = places == self.lens[behind[fresh], None]
        self.ids[behind] = np.where(same, new, self.ids[behind])
        self.counts[behind] += same
        self.lens[behind] += fresh
        self.num_seen[behind] += 1

    def _count(self, i: int, row: Row) -> None:
        """Counts row `i` from scratch: it is new here."""
        ids = np.array(row.prompt_ids + row.output_ids, np.int64)
        different, inverse = np.unique(ids, return_inverse=True)
        self._reserve(len(different))
        self.ids[i, : len(different)] = different
        self.counts[i] = 0
        np.add.at(self.counts[i], inverse[len(row.prompt_ids) :], 1)
        self.lens[i] = len(different)
        self.num_seen[i] = len(row.output_ids)

    def _reserve(self, num_ids: int) -> None:
        more = max(num_ids, 2 * self.ids.shape[1], 64) - self.ids.shape[1]
        if num_ids > self.ids.shape[1]:
            self.ids = np.pad(self.ids, ((0, 0), (0, more)))
            self.counts = np.pad(self.counts, ((0, 0), (0, more)))


def _inside(ids: Sequence[int], vocab_size: int) -> Ints:
    found = np.array(ids, np.int64)
    return found[(found >= 0) & (found < vocab_size)]


def sequence_ends(row: Row, sequences: Sequence[Sequence[int]]) -> list[int]:
    """The ids that would complete one of the sequences, given the row's known ids.

    Worked example: sequences (5,) and (6, 7), last known id 6: [5, 7].
    """
    longest = max(len(sequence) for sequence in sequences) - 1
    known = row.output_ids[-longest:] if longest else []
    if len(known) < longest:
        known = row.prompt_ids[len(known) - longest :] + known
    return [ids[-1] for ids in sequences if list(ids[:-1]) == known[len(known) - len(ids) + 1 :]]


def _repeats(row: Row) -> Ints:
    """The ids that would repeat an n-gram of the row's own, or of its source."""
    ids, sampling = row.prompt_ids + row.output_ids, row.sampling
    sizes = ((ids, sampling.no_repeat_ngram_size), (row.encoder_ids, sampling.encoder_no_repeat_ngram_size))
    return np.concatenate([repeated_ngram_ends(ids, size, among) for among, size in sizes if size])


def repeated_ngram_ends(ids: Sequence[int], size: int, among: Sequence[int] | None = None) -> Ints:
    """The ids that would complete, behind `ids`, an n-gram of `size` that is in `among` (None: in `ids` themselves).

    Worked example: size 3, ids [5, 6, 7, 5, 6]: the last two, (5, 6), were once followed by 7: [7].
    """
    seen, known = np.array(ids if among is None else among, np.int64), np.array(ids, np.int64)
    if len(seen) < size or len(known) < size - 1:
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(seen, size)
    prefix = known[len(known) + 1 - size :]
    found: Ints = np.unique(windows[(windows[:, :-1] == prefix).all(axis=1), -1])
    return found
