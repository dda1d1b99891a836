"""Loads a checkpoint's draft: a smaller network of the same tokens, which guesses those that the large one checks.

It belongs to the large one's lane, comes and goes with it, and has its part of the memory that is meant for KV blocks.
Runs in the worker process, on its loader thread.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from model.attention.interface import AttentionBackend
from model.decoder import Decoder
from model.drafting_runner import DraftingRunner
from model.encoder_decoder import EncoderDecoder
from model.errors import CheckpointError
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache, KVCacheShape
from model.runner import Runner
from service.engine.chosen_numbers import cache_dtype_of, dtype_of
from service.engine.generating_network import cache_shape, load_generating
from service.engine.protocol import ModelSpec, WorkerConfig

USUAL_TOKENS = 5
"""The most guesses for a request in a step where nobody has said: of a draft that is right four times in five, a third
come so far."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    network: Decoder
    cache_dtype: torch.dtype
    """Of keys and values."""

    def cache_shape(self, block_size: int) -> KVCacheShape:
        return cache_shape(self.network.config, block_size, self.cache_dtype)

    def runner(
        self,
        network: Decoder | EncoderDecoder,
        cache: KVCache,
        backend: AttentionBackend,
        grammars: GrammarCompiler | None = None,
    ) -> DraftingRunner:
        """Of the large network, with guesses of this one, which gets a cache of the same blocks."""
        assert isinstance(network, Decoder)
        own = KVCache.of_shape(self.cache_shape(cache.block_size), cache.num_blocks, cache.device)
        draft = Runner(self.network, self.network.config, own, backend)
        return DraftingRunner(network, cache, backend, draft=draft, grammars=grammars)


def load_draft(spec: ModelSpec, config: WorkerConfig, device: torch.device) -> LoadedDraft | None:
    """None where there is none to load. Raises CheckpointError, naming file and tensor, if it is not what it should
    be."""
    if spec.draft is None:
        return None
    if config.num_ranks > 1:
        raise CheckpointError("a draft is not to be had with tensor_parallel_size above 1")
    if device.type != "cpu":
        raise CheckpointError("a draft needs a CPU: on GPUs its guesses would keep steps out of captured graphs")
    own = msgspec.structs.replace(spec, folder=spec.draft, base=None, draft=None, max_model_len=None)
    dtype = dtype_of(own, Path(own.folder), device)
    network = load_generating(own, device, dtype)
    assert isinstance(network, Decoder)
    if dtype != torch.bfloat16:  # then nothing reads keys and values in 8 bits
        return LoadedDraft(network, dtype)
    return LoadedDraft(network, cache_dtype_of(own, network.config, config.block_size, dtype, device))
