"""Beam search over given candidates: which hypotheses live on, which are finished, when nothing better can come.

Token for token what `transformers` 5 does in `GenerationMixin._beam_search`, its float32 rounding and its placeholder
score of -1e9 included. Pure bookkeeping of one request: no model, no blocks, no scheduling. Runs in the worker process.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Literal

from model.batch import BeamParams

ABSENT = -1.0e9
"""The score of what is not there; added to a score, it takes the candidate out of the running."""


def num_beam_candidates(num_beams: int, num_eos: int) -> int:
    """Continuations to look at in a step: enough that `num_beams` remain if as many as possible end the text."""
    return max(2, 1 + num_eos) * num_beams


def _float32(values: Iterable[float]) -> list[float]:
    return array("f", values).tolist()


@dataclass(slots=True)
class _Running:
    """A live hypothesis: the row that computes it (twins share one), its ids, its summed log-probability."""

    row: int
    token_ids: list[int]
    score: float


@dataclass(slots=True)
class _Finished:
    token_ids: list[int]
    score: float
    is_real: bool


@dataclass(slots=True)
class _Candidate:
    parent: _Running
    token_id: int
    score: float
    ends: bool


class BeamSearch:
    """The search of one request. `advance` takes every row's candidates and says which rows come next."""

    def __init__(self, params: BeamParams, *, eos_ids: Sequence[int], max_tokens: int) -> None:
        assert params.num_beams > 1
        assert max_tokens > 0
        self.num_beams = params.num_beams
        self._length_penalty = params.length_penalty
        self._early_stopping: bool | Literal["never"] = params.early_stopping
        self._eos_ids = frozenset(eos_ids)
        self._max_tokens = max_tokens
        self._num_kept = num_beam_candidates(params.num_beams, len(self._eos_ids))
        self._num_generated = 0
        # Only the first of the equal starts counts, or every beam would say the same.
        starts = [0.0] + [ABSENT] * (self.num_beams - 1)
        self._running = [_Running(row=0, token_ids=[], score=score) for score in starts]
        self._finished = [_Finished([], ABSENT, False) for _ in starts]
        self.is_done = False

    @property
    def best(self) -> list[int]:
        """Ids of the best finished hypothesis, the ending id included."""
        return self._finished[0].token_ids

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        return "stop" if self.best and self.best[-1] in self._eos_ids else "length"

    def advance(self, rows: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, int]]:
        """Takes one step: `rows[r]` are row r's best (token id, log-probability), as many as `num_beam_candidates`.

        Returns the rows of the next step as (row that it continues, token id); none when the search is done.
        """
        assert not self.is_done
        candidates = self._best_candidates(rows)
        self._finish(candidates)
        next_rows = self._continue(candidates)
        self._num_generated += 1
        full = self._early_stopping is True and all(entry.is_real for entry in self._finished)
        self.is_done = full or not self._may_improve() or all(candidate.ends for candidate in candidates)
        return [] if self.is_done else next_rows

    def _best_candidates(self, rows: Sequence[Sequence[tuple[int, float]]]) -> list[_Candidate]:
        """The best continuations over all beams, best first; of equal ones that of the earlier beam, the smaller id."""
        last = self._num_generated + 1 >= self._max_tokens
        found: list[tuple[float, int, int, _Running]] = []
        for index, beam in enumerate(self._running):
            row = rows[beam.row]
            scores = _float32(beam.score + logprob for _, logprob in row)
            found += [(score, -index, -token, beam) for (token, _), score in zip(row, scores, strict=True)]
        best = nlargest(self._num_kept, found, key=lambda entry: entry[:3])
        return [_Candidate(beam, -token, score, last or -token in self._eos_ids) for score, _, token, beam in best]

    def _continue(self, candidates: list[_Candidate]) -> list[tuple[int, int]]:
        """Chooses the next running beams; equal continuations of one row become one row."""
        scores = _float32(candidate.score + (ABSENT if candidate.ends else 0.0) for candidate in candidates)
        order = sorted(range(len(candidates)), key=lambda index: -scores[index])[: self.num_beams]
        next_rows: dict[tuple[int, int], int] = {}
        running = []
        for index in order:
            candidate = candidates[index]
            key = (candidate.parent.row, candidate.token_id)
            row = next_rows.setdefault(key, len(next_rows))
            running.append(_Running(row, [*candidate.parent.token_ids, candidate.token_id], scores[index]))
        self._running = running
        return list(next_rows)

    def _finish(self, candidates: list[_Candidate]) -> None:
        """Lets the candidates that end, of the first `num_beams`, compete with the finished hypotheses."""
        scores = self._normalised([candidate.score for candidate in candidates], self._num_generated + 1)
        merged = list(self._finished)
        for index, candidate in enumerate(candidates):
            ends = candidate.ends and index < self.num_beams
            score = scores[index] if ends else _float32([scores[index] + ABSENT])[0]
            merged.append(_Finished([*candidate.parent.token_ids, candidate.token_id], score, ends))
        self._finished = sorted(merged, key=lambda entry: -entry.score)[: self.num_beams]

    def _normalised(self, scores: list[float], length: int) -> list[float]:
        divisor = _float32([length**self._length_penalty])[0]
        return _float32(score / divisor for score in scores)

    def _may_improve(self) -> bool:
        """Whether the best running beam could still beat the worst finished one, at the length taken as the best.

        The heuristic of `transformers`: the present length, or with "never" and a reward for length the longest one.
        """
        length = self._num_generated
        if self._early_stopping == "never" and self._length_penalty > 0.0:
            length = self._max_tokens
        best = self._normalised([self._running[0].score], length)[0]
        worst = self._finished[-1].score if all(entry.is_real for entry in self._finished) else ABSENT
        return best > worst
