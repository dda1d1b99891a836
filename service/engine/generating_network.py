"""A generating network on the fastest layers that its device has, and what a block of its KV cache takes.

Runs in the worker process and in those of its ranks, on their loader threads.
"""

import torch
from torch import nn

from model.checkpoint import Progress, load_network
from model.compiled_decoder import join_layers
from model.compiled_layers import Packing, compile_layers
from model.config import DecoderConfig, EncoderDecoderConfig
from model.decoder import Decoder
from model.encoder_decoder import EncoderDecoder
from model.gpu_network import fuse_layers
from model.kv_cache import KVCacheShape
from model.layers import Linear
from model.packed_linear import pack
from service.engine.joined_folders import folder_of
from service.engine.memory import free_pages
from service.engine.protocol import ModelSpec

FREED_EVERY = 128 << 20
"""Bytes read of a checkpoint after which pages that were freed go back to the machine."""


def load_generating(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> Decoder | EncoderDecoder:
    """A generating network, or this rank's part of it, on the fastest layers that the device has.

    Where it is whole its projections are packed as they are read: their weights are never all there as they are stored.
    """

    packing = Packing(spec.quantization)
    freed = 0

    def told(done: int, total: int) -> None:
        nonlocal freed
        if done - freed >= FREED_EVERY:
            free_pages()
            freed = done
        if progress is not None:
            progress(done, total)

    def finished(name: str, module: nn.Module) -> nn.Module:
        return packing.packed(module, wide=name == "output") if isinstance(module, Linear) else module

    with folder_of(spec) as folder:
        network = load_network(
            folder,
            device,
            dtype,
            told,
            max_model_len=spec.max_model_len,
            rank=rank,
            num_ranks=num_ranks,
            finished=finished if num_ranks == 1 else None,
        )
    assert isinstance(network, Decoder | EncoderDecoder)
    compile_layers(network, spec.quantization, wide=network.output)
    if isinstance(network, Decoder):
        join_layers(network)
    fuse_layers(network)
    pack(network)
    return network


def cache_shape(config: DecoderConfig | EncoderDecoderConfig, block_size: int, dtype: torch.dtype) -> KVCacheShape:
    return KVCacheShape(
        num_layers=config.num_layers,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=dtype,
    )
