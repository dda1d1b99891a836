"""A runner with a second, smaller network, the draft: it guesses the tokens that a step of the large one checks.

The draft has a paged cache of its own with the blocks of the large one's, so that a row's block ids hold for both. What
it computes, and how many tokens it guesses, the rows say. It samples as the large network will, by the request's own
parameters and noise, so that both choose the same token wherever they think alike. Runs in the worker process, main
thread.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from model.attention.interface import AttentionBackend
from model.batch import Batch, Row, SamplingParams
from model.decoder import Decoder
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.runner import LaunchedStep, Runner


class DraftingRunner(Runner):
    def __init__(
        self,
        network: Decoder,
        kv_cache: KVCache,
        backend: AttentionBackend,
        *,
        draft: Runner,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        super().__init__(network, network.config, kv_cache, backend, grammars=grammars)
        shapes = [(cache.num_blocks, cache.block_size) for cache in (kv_cache, draft.kv_cache)]
        assert shapes[0] == shapes[1], "the draft's cache has other blocks"
        self._draft = draft

    def launch(self, batch: Batch) -> LaunchedStep:
        """Puts the draft's guesses into the rows before it queues what checks them."""
        started = time.perf_counter()
        self._guess(batch.rows)
        self.draft_seconds = time.perf_counter() - started
        step = super().launch(batch)
        step.started = started
        return step

    def recover(self) -> None:
        super().recover()
        self._draft.recover()

    def _guess(self, rows: Sequence[Row]) -> None:
        """The first pass is over all that the draft is to compute, each further one over the guesses of the one before,
        of the rows that want more."""
        pairs = [(row, _draft_row(row)) for row in rows if row.draft_ids]
        nth = 0
        while pairs:
            outputs = self._draft.run(Batch([own for _, own in pairs])).rows
            for (row, own), output in zip(pairs, outputs, strict=True):
                if nth < row.num_drafted:
                    # An id that the draft does not know, or a logit that is no number: any guess will do.
                    guess = output.token_id or 0
                    row.token_ids[nth - row.num_drafted] = guess
                    own.start += len(own.token_ids)
                    own.token_ids = [guess]
                    own.output_ids.append(guess)
            nth += 1
            pairs = [(row, own) for row, own in pairs if nth < row.num_drafted]


def _draft_row(row: Row) -> Row:
    """What the draft sees of a row, with ids of its own to write to."""
    return Row(
        row.sequence_id,
        row.draft_ids,
        row.draft_start,
        row.block_ids,
        _unscored(row.sampling),
        row.num_drafted > 0,
        list(row.output_ids),
        row.prompt_ids,
    )


def _unscored(sampling: SamplingParams) -> SamplingParams:
    """Nobody reads the log-probabilities of guesses."""
    if sampling.logprobs is None and sampling.prompt_logprobs is None:
        return sampling
    return replace(sampling, logprobs=None, prompt_logprobs=None)
