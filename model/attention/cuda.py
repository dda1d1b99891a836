"""Attention on CUDA devices: which kernel serves which rules.

The paged cache is read by our Triton kernel, which knows every rule and any block size; where blocks are large enough
for them (multiples of 256 tokens) and the rules plain, by PyTorch's flash kernels. Encoders' packed sequences run in
those too, or in padded batches where the rules are beyond them. A decoder's single row does not come here where
`triton_one_row` serves it. Runs in the worker process.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.attention.interface import AttentionRules, PackedLayout, PagedLayout
from model.attention.padded import padded_attention
from model.attention.reference import ReferenceAttention

Store = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
Paged = Callable[[Tensor, Tensor, Tensor, PagedLayout, AttentionRules], Tensor]
triton_paged: Paged | None
triton_store: Store | None
try:
    from model.attention.triton_paged import triton_paged
    from model.triton_layers import store as triton_store
    from model.triton_layers import stores
except ImportError:  # builds of torch for some platforms come without Triton
    triton_paged = triton_store = None

FLASH_BLOCK_TOKENS = 256
FLASH_MAX_HEAD_SIZE = 256


def _flash() -> Callable[..., Any] | None:
    """PyTorch's packed flash attention, from the version on that knows windows."""
    try:
        found = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found if "window_size" in inspect.signature(found).parameters else None


flash_attention = _flash()
FLASH_KNOWS = frozenset(inspect.signature(flash_attention).parameters) if flash_attention is not None else frozenset()
"""Later versions' also reads a paged cache and lets query heads share a key head."""
FLASH_READS_PAGES = {"block_table", "seqused_k", "enable_gqa"} <= FLASH_KNOWS


class CudaAttention:
    """`AttentionBackend` for CUDA."""

    def __init__(self) -> None:
        self._reference = ReferenceAttention()

    def paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
    ) -> Tensor:
        arguments = (query, key_cache, value_cache, layout, rules)
        kernel = paged_kernel(query.dtype, query.shape[2], key_cache.shape[1], rules)
        if kernel == "flash":
            return self._flash_paged(*arguments)
        if kernel == "triton":
            assert triton_paged is not None
            return triton_paged(*arguments)
        return self._reference.paged(*arguments)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rules: AttentionRules) -> Tensor:
        if rules.sinks is not None:
            return self._reference.packed(query, key, value, layout, rules)
        if not serves_flash(query.dtype, query.shape[2], rules):
            return padded_attention(query, key, value, layout, rules)
        return _flash_packed(query, key, value, layout, rules)

    def write(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, rules: AttentionRules
    ) -> None:
        if triton_store is not None and stores(key, value, key_cache, value_cache):
            triton_store(key, value, key_cache, value_cache, slots)
            return
        self._reference.write(key, value, key_cache, value_cache, slots, rules)

    def _flash_paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, rules: AttentionRules
    ) -> Tensor:
        assert flash_attention is not None
        out: Tensor = flash_attention(
            query.contiguous(),
            key_cache,
            value_cache,
            layout.query_starts,
            None,
            layout.max_query_len,
            layout.max_context_len,
            scale=rules.scale,
            window_size=flash_window(rules),
            enable_gqa=query.shape[1] != key_cache.shape[2],
            seqused_k=layout.context_lens,
            block_table=layout.block_tables,
        )
        return out


def _flash_packed(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rules: AttentionRules) -> Tensor:
    """By the operator below `varlen_attn`: query heads share a key head in every version of it, heads of one fused
    projection are read where they lie, and nothing is made ready for gradients."""
    before, after = flash_window(rules)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        layout.starts,
        layout.starts,
        layout.max_len,
        layout.max_len,
        0.0,  # no dropout
        False,  # causal as a window
        False,
        scale=rules.scale,
        window_size_left=before,
        window_size_right=after,
    )[0]
    return out


def paged_kernel(dtype: torch.dtype, head_size: int, block_size: int, rules: AttentionRules) -> str:
    """ "flash", "triton" or "reference": the fastest that is there and knows the rules."""
    if FLASH_READS_PAGES and serves_flash(dtype, head_size, rules) and block_size % FLASH_BLOCK_TOKENS == 0:
        return "flash"
    return "triton" if triton_paged is not None and rules.sinks is None else "reference"


def serves_flash(dtype: torch.dtype, head_size: int, rules: AttentionRules) -> bool:
    """Whether PyTorch's flash kernels can do it: half precision, and nothing done to the scores but scale and mask."""
    plain = (rules.softcap, rules.alibi_slopes, rules.relative_bias, rules.sinks) == (None, None, None, None)
    half = dtype in (torch.float16, torch.bfloat16)
    return flash_attention is not None and plain and half and head_size % 8 == 0 and head_size <= FLASH_MAX_HEAD_SIZE


def flash_window(rules: AttentionRules) -> tuple[int, int]:
    """Keys before and after a query that it sees, its own apart; -1 for all.

    Worked example: a causal window of 4 sees positions i - 3 to i: (3, 0).
    """
    before = -1 if rules.window is None else rules.window - 1
    return before, 0 if rules.causal else before
