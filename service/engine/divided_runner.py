"""A runner whose every forward pass is run by the other ranks too.

Knows which passes, not what the ranks do with them (`service.engine.rank`). Runs in rank 0's worker process.
"""

import logging

from model.attention.interface import AttentionBackend
from model.batch import Batch
from model.decoder import Decoder
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.runner import LaunchedStep, Runner
from service.engine.ranks import Ranks

log = logging.getLogger("slimpajama.worker")


class DividedRunner(Runner):
    def __init__(
        self,
        network: Decoder,
        cache: KVCache,
        backend: AttentionBackend,
        *,
        ranks: Ranks,
        model: str,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        super().__init__(network, network.config, cache, backend, grammars=grammars)
        self._ranks = ranks
        self._model = model
        with ranks.lock:
            ranks.make_cache(model, cache.num_blocks, str(cache.dtype).removeprefix("torch."))

    def launch(self, batch: Batch) -> LaunchedStep:
        """A pass that raises here ends the worker: the other ranks are in the middle of it and wait for us."""
        with self._ranks.lock:
            self._ranks.forward(self._model, batch)
            try:
                return super().launch(batch)
            except Exception as error:
                log.exception("step failed", extra={"model": self._model, "rows": len(batch.rows)})
                raise SystemExit(1) from error
