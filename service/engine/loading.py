"""Makes a lane of a checkpoint: reads the weights, sizes the KV cache, picks dtype and attention for the device.

Runs in the worker process, on its loader thread; what it returns belongs to the main thread from then on.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend
from model.block_manager import BlockManager
from model.checkpoint import StoredTensors, load_network
from model.config import DecoderConfig, EncoderDecoderConfig
from model.decoder import Decoder
from model.description import CheckpointDescription, describe
from model.encode_network import load_encode_network
from model.encoder_decoder import EncoderDecoder
from model.encoder_runner import EncoderRunner
from model.kv_cache import KVCache, KVCacheShape, free_device_bytes
from model.runner import Runner
from service.engine.batcher import Batcher
from service.engine.generation_lane import GenerationLane
from service.engine.lanes import Lane
from service.engine.protocol import Loaded, ModelSpec, WorkerConfig
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.single_pass_lane import SinglePassLane

log = logging.getLogger("slimpajama.worker")

CPU_KV_CACHE_BYTES = 1 << 30
Progress = Callable[[int, int], None]


def load_lane(spec: ModelSpec, config: WorkerConfig, progress: Progress, wake: Callable[[], None]) -> Lane:
    """Raises CheckpointError, naming file and tensor, if the checkpoint is not what it should be."""
    began = time.monotonic()
    device = _device(config.device)
    folder = Path(spec.folder)
    description = describe(folder, spec.max_model_len)
    dtype = _dtype(spec, folder, device)
    backend = _backend(device)
    loaded = Loaded(model=spec.key, dtype=str(dtype).removeprefix("torch."), device=str(device), weight_bytes=0)
    if description.head == "language_model":
        network = load_network(folder, device, dtype, progress, max_model_len=spec.max_model_len)
        assert isinstance(network, Decoder | EncoderDecoder)
        lane: Lane = _generation_lane(loaded, network, description, spec, config, backend)
    else:
        encoder = load_encode_network(folder, device, dtype, progress, max_model_len=spec.max_model_len)
        lane = SinglePassLane(loaded, Batcher(config.max_batch_tokens), EncoderRunner(encoder, backend, device))
        network = encoder
    parameters = {parameter.data_ptr(): parameter for parameter in network.parameters()}
    loaded.weight_bytes = sum(entry.numel() * entry.element_size() for entry in parameters.values())
    loaded.load_seconds = time.monotonic() - began
    log.info(
        "checkpoint loaded",
        extra={"model": spec.key, "dtype": loaded.dtype, "weight_bytes": loaded.weight_bytes}
        | ({"kv_cache": _cache_text(loaded)} if loaded.num_blocks else {}),
    )
    return lane


def _generation_lane(
    loaded: Loaded,
    network: Decoder | EncoderDecoder,
    description: CheckpointDescription,
    spec: ModelSpec,
    config: WorkerConfig,
    backend: AttentionBackend,
) -> GenerationLane:
    device = torch.device(loaded.device)
    shape = _cache_shape(network.config, config.block_size, getattr(torch, loaded.dtype))
    if spec.kv_cache_bytes is not None:
        budget = spec.kv_cache_bytes
    elif device.type == "cuda":
        budget = free_device_bytes(device, config.kv_cache_fraction)
    else:
        budget = CPU_KV_CACHE_BYTES
    num_blocks = shape.num_blocks_for(budget)
    if num_blocks < 1:
        raise ValueError(
            f"kv_cache_memory of {budget:,} bytes holds no block; a block takes {shape.block_bytes:,} bytes"
        )
    cache = KVCache.of_shape(shape, num_blocks, device)
    loaded.num_blocks, loaded.block_size = num_blocks, config.block_size
    limits = SchedulerLimits(
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_model_len=description.context_length,
    )
    scheduler = Scheduler(BlockManager(num_blocks, config.block_size, config.prefix_caching), limits)
    return GenerationLane(loaded, scheduler, Runner(network, network.config, cache, backend))


def _cache_text(loaded: Loaded) -> str:
    tokens = loaded.num_blocks * loaded.block_size
    return f"{loaded.num_blocks:,} blocks of {loaded.block_size} tokens = {tokens:,} tokens"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _dtype(spec: ModelSpec, folder: Path, device: torch.device) -> torch.dtype:
    """What was asked for; else bfloat16 on GPUs, and on CPUs float32 unless the weights are stored in 16 bits and the
    CPU multiplies bfloat16 in hardware."""
    if spec.dtype != "auto":
        found: torch.dtype = getattr(torch, spec.dtype)
        return found
    if device.type == "cuda":
        return torch.bfloat16
    with StoredTensors(folder) as stored:
        narrow = stored.common_dtype().itemsize == 2 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if narrow else torch.float32


def _backend(device: torch.device) -> AttentionBackend:
    return CpuAttention()


def _cache_shape(config: DecoderConfig | EncoderDecoderConfig, block_size: int, dtype: torch.dtype) -> KVCacheShape:
    return KVCacheShape(
        num_layers=config.num_layers,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=dtype,
    )
