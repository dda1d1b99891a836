"""Adapters between the networks' calls and a backend: they know where keys and values of this step live.

A network calls `attend(layer, query, key, value, rules)`; a cached decoder's adapter writes keys and values into the
paged cache first and then reads the whole context, an encoder's adapter looks at this step's tokens alone, and
cross-attention only reads. Built anew for each step. Runs in the worker process.
"""

from torch import Tensor

from model.attention.interface import AttentionBackend, AttentionRules, PackedLayout, PagedLayout
from model.kv_cache import KVCache


class CachedAttend:
    """Self-attention over the paged cache. All rows' keys are written before any is read: rows may share blocks."""

    def __init__(self, cache: KVCache, layout: PagedLayout, backend: AttentionBackend) -> None:
        self.cache = cache
        self.layout = layout
        self.backend = backend

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        key_cache, value_cache = self.cache.keys[layer], self.cache.values[layer]
        self.backend.write(key, value, key_cache, value_cache, self.layout.slots, rules)
        return self.backend.paged(query, key_cache, value_cache, self.layout, rules)


class PackedAttend:
    """Attention among this step's tokens, each sequence for itself; nothing is kept."""

    def __init__(self, layout: PackedLayout, backend: AttentionBackend) -> None:
        self.layout = layout
        self.backend = backend

    def __call__(
        self,
        layer: int,  # noqa: ARG002 - part of the interface; nothing is kept per layer
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rules: AttentionRules,
    ) -> Tensor:
        return self.backend.packed(query, key, value, self.layout, rules)


class CrossAttendPaged:
    """Cross-attention: the encoded source's keys and values were written to the cache when it was encoded."""

    def __init__(self, cache: KVCache, layout: PagedLayout, backend: AttentionBackend) -> None:
        self.cache = cache
        self.layout = layout
        self.backend = backend

    def __call__(self, layer: int, query: Tensor, rules: AttentionRules) -> Tensor:
        return self.backend.paged(query, self.cache.keys[layer], self.cache.values[layer], self.layout, rules)
