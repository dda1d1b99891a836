"""Makes a lane of a checkpoint: reads the weights, sizes the KV cache, picks attention for the device.

Runs in the worker process, on its loader thread; what it returns belongs to the main thread from then on.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from model.attention.backend import backend_for
from model.attention.interface import AttentionBackend
from model.block_manager import BlockManager
from model.checkpoint import Progress
from model.compiled_layers import weight_bytes
from model.decoder import Decoder
from model.description import CheckpointDescription, describe
from model.encode_network import EncodeNetwork, load_encode_network
from model.encoder_decoder import EncoderDecoder
from model.encoder_runner import EncoderRunner
from model.errors import CheckpointError
from model.gpu_network import fuse_layers
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache, free_device_bytes
from model.memory_profile import largest_batch, step_bytes
from model.ops import library
from model.runner import Runner
from model.tokenizer import Tokenizer
from service.engine.batcher import Batcher
from service.engine.cache_budget import ALONE, Neighbours
from service.engine.chosen_numbers import cache_dtype_of, device_of, dtype_of, has_plain_scores, quantization_of
from service.engine.divided_runner import DividedRunner
from service.engine.draft_loading import USUAL_TOKENS, LoadedDraft, load_draft
from service.engine.generating_network import cache_shape, load_generating
from service.engine.generation_lane import GenerationLane
from service.engine.joined_folders import folder_of
from service.engine.lanes import Lane
from service.engine.protocol import Loaded, ModelSpec, Quantization, WorkerConfig, max_batch_items
from service.engine.ranks import Ranks
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.single_pass_lane import SinglePassLane

log = logging.getLogger("slimpajama.worker")

CPU_STEP_TOKENS = 512
"""From here on a step's own cost is small beside that of BERT's tokens."""
BASE_LAYER_WEIGHTS = 85_000_000
"""Of BERT's base size."""
MAX_STEPS_AT_ONCE = 8
"""MiniLM's: a step of a smaller network is over sooner."""


def load_lane(
    spec: ModelSpec,
    config: WorkerConfig,
    progress: Progress,
    wake: Callable[[], None],
    ranks: Ranks | None = None,
    *,
    neighbours: Neighbours = ALONE,
) -> Lane:
    """With `ranks`, a language model that is a decoder is divided over them; anything else is whole on rank 0. What the
    `neighbours` need, too, is left to them.

    Raises CheckpointError, naming file and tensor, if the checkpoint is not what it should be.
    """
    began = time.monotonic()
    device = device_of(config.device) if ranks is None else ranks.device
    with folder_of(spec) as folder:
        description = describe(folder, spec.max_model_len)
        dtype = dtype_of(spec, folder, device)
        tokenizer = Tokenizer.load(folder) if description.head == "language_model" else None
    backend = backend_for(device, deterministic=config.deterministic)
    loaded = Loaded(
        model=spec.key,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        weight_bytes=0,
        quantization=quantization_of(spec, generates=tokenizer is not None),
    )
    network: nn.Module
    if tokenizer is not None:
        divided = ranks if description.network == "decoder" else None
        draft = load_draft(spec, config, device)
        with divided.hold(spec, loaded.dtype) if divided is not None else nullcontext():
            num_ranks = divided.size if divided is not None else 1
            network = load_generating(spec, device, dtype, progress, num_ranks=num_ranks)
        _check_promises(config, network, dtype, device)
        grammars = _make_grammars(tokenizer, network, description, config, wake)
        make_runner = partial(_make_runner, network, backend, grammars, divided, spec.key)
        cache = _make_cache(loaded, network, make_runner, spec, config, draft=draft, neighbours=neighbours)
        scheduler = _make_scheduler(cache, description, config, draft)
        runner = make_runner(cache) if draft is None else draft.runner(network, cache, backend, grammars)
        loaded.weight_bytes = 0 if draft is None else weight_bytes(draft.network)
        look_ahead = _looks_ahead(config, device, divided)
        lane: Lane = GenerationLane(loaded, scheduler, runner, grammars, look_ahead=look_ahead)
    else:
        network = encoder = _load_encoding(spec, device, dtype, loaded.quantization, progress)
        loaded.max_step_tokens = step_tokens_alone(config.max_batch_tokens, encoder, device)
        lane = SinglePassLane(loaded, _make_batcher(loaded, encoder, config), EncoderRunner(encoder, backend, device))
    loaded.weight_bytes += weight_bytes(network)
    loaded.load_seconds = time.monotonic() - began
    log.info(
        "checkpoint loaded",
        extra={"model": spec.key, "dtype": loaded.dtype, "weight_bytes": loaded.weight_bytes}
        | ({"quantization": loaded.quantization} if loaded.quantization != "none" else {})
        | ({"kv_cache": _cache_text(loaded)} if loaded.num_blocks else {})
        | ({"draft": spec.draft} if spec.draft is not None else {}),
    )
    return lane


def step_tokens_alone(max_batch_tokens: int, encoder: EncodeNetwork, device: torch.device) -> int:
    """On CPUs a small network that has the worker to itself takes more tokens a step, as many as take the time of
    `CPU_STEP_TOKENS` in a network of BERT's base size: what a step costs beside them weighs less then.

    Worked example: all-MiniLM-L6 has 10.6 million weights in its layers, an eighth of BERT's: 8 * 512 = 4,096.
    """
    if device.type != "cpu":
        return max_batch_tokens
    factor = min(MAX_STEPS_AT_ONCE, max(1, BASE_LAYER_WEIGHTS // max(1, encoder.num_layer_weights)))
    return max(max_batch_tokens, factor * min(max_batch_tokens, CPU_STEP_TOKENS))


def _load_encoding(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, quantization: Quantization, progress: Progress
) -> EncodeNetwork:
    with folder_of(spec) as folder:
        network = load_encode_network(
            folder,
            device,
            dtype,
            progress,
            max_model_len=spec.max_model_len,
            quantization=quantization,
            exact=spec.dtype == "float32",
        )
    fuse_layers(network)
    return network


def _make_grammars(
    tokenizer: Tokenizer,
    network: Decoder | EncoderDecoder,
    description: CheckpointDescription,
    config: WorkerConfig,
    wake: Callable[[], None],
) -> GrammarCompiler:
    return GrammarCompiler(
        tokenizer.backend.to_str(),
        network.config.vocab_size,
        description.eos_ids,
        timeout_seconds=config.grammar_timeout_seconds,
        wake=wake,
    )


def _make_batcher(loaded: Loaded, encoder: EncodeNetwork, config: WorkerConfig) -> Batcher:
    sparse_size = None if encoder.splade is None else encoder.config.vocab_size
    return Batcher(config.max_batch_tokens, max_batch_items(sparse_size), max_tokens_alone=loaded.max_step_tokens)


def _make_runner(
    network: Decoder | EncoderDecoder,
    backend: AttentionBackend,
    grammars: GrammarCompiler,
    ranks: Ranks | None,
    model: str,
    cache: KVCache,
) -> Runner:
    if ranks is None:
        return Runner(network, network.config, cache, backend, grammars=grammars)
    assert isinstance(network, Decoder)
    return DividedRunner(network, cache, backend, ranks=ranks, model=model, grammars=grammars)


def _looks_ahead(config: WorkerConfig, device: torch.device, ranks: Ranks | None) -> bool:
    if ranks is not None:  # tokens are rank 0's alone; settings refuse to ask for both
        return False
    return config.overlap == "on" or (config.overlap == "auto" and device.type == "cuda")


def _check_promises(config: WorkerConfig, network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises CheckpointError where what is asked for cannot be had with this network on this device."""
    if config.deterministic:
        _check_deterministic(network, dtype, device)
    if config.speculative_tokens and device.type != "cpu":
        raise CheckpointError("speculative_tokens needs a CPU: on GPUs it would keep steps out of captured graphs")


def _check_deterministic(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises CheckpointError where bitwise the same answer in any batch cannot be promised."""
    plain = isinstance(network, Decoder) and has_plain_scores(network.config)
    if not (plain and device.type == "cpu" and dtype == torch.bfloat16 and library.LOADED):
        raise CheckpointError(
            "deterministic is not to be had here: it needs a CPU, dtype bfloat16, the compiled operators and a "
            "decoder without ALiBi and softcaps"
        )


def _make_cache(
    loaded: Loaded,
    network: Decoder | EncoderDecoder,
    make_runner: Callable[[KVCache], Runner],
    spec: ModelSpec,
    config: WorkerConfig,
    *,
    draft: LoadedDraft | None,
    neighbours: Neighbours,
) -> KVCache:
    """A KV cache of the bytes asked for; without being told, a share of a GiB on CPUs, and on GPUs of what the largest
    step leaves of the memory that may be used. A draft's blocks, as many, are of the same bytes."""
    shape_of = network.config
    device = torch.device(loaded.device)
    dtype = cache_dtype_of(spec, shape_of, config.block_size, getattr(torch, loaded.dtype), device)
    shape = cache_shape(shape_of, config.block_size, dtype)
    beside = 0 if draft is None else draft.cache_shape(config.block_size).block_bytes
    block_bytes = shape.block_bytes + beside
    if spec.kv_cache_bytes is not None:
        budget = spec.kv_cache_bytes
    elif device.type == "cuda":
        step = step_bytes(
            shape,
            device,
            make_runner,
            partial(
                largest_batch,
                config.max_batch_tokens,
                config.max_sequences,
                shape_of.context_length,
                config.block_size,
                encodes=isinstance(network, EncoderDecoder),
            ),
        )
        budget = neighbours.gpu_share(free_device_bytes(device, config.kv_cache_fraction) - step)
    else:
        budget = neighbours.cpu_share()
    loaded.num_blocks, loaded.block_size = shape.num_blocks_for(budget, bytes_beside=beside), config.block_size
    loaded.kv_cache_bytes = (loaded.num_blocks + 1) * block_bytes
    loaded.kv_cache_dtype = str(dtype).removeprefix("torch.")
    if loaded.num_blocks < 1:
        raise ValueError(f"kv_cache_memory: {budget:,} bytes hold no block; a block takes {block_bytes:,} bytes")
    return KVCache.of_shape(shape, loaded.num_blocks, device)


def _make_scheduler(
    cache: KVCache, description: CheckpointDescription, config: WorkerConfig, draft: LoadedDraft | None
) -> Scheduler:
    """Prompts are sized by their time where that is in their tokens: on a GPU a captured graph is far faster than any
    step with prompts, and a source is encoded whole."""
    usual = 0 if draft is None else USUAL_TOKENS
    by_time = cache.device.type == "cpu" and description.network == "decoder"
    limits = SchedulerLimits(
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_model_len=description.context_length,
        max_step_stretch=config.max_step_stretch if by_time else None,
        speculative_tokens=usual if config.speculative_tokens is None else config.speculative_tokens,
        draft_len=None if draft is None else draft.network.config.context_length,
    )
    return Scheduler(BlockManager(cache.num_blocks, cache.block_size, config.prefix_caching), limits)


def _cache_text(loaded: Loaded) -> str:
    tokens = loaded.num_blocks * loaded.block_size
    return f"{loaded.num_blocks:,} blocks of {loaded.block_size} tokens = {tokens:,} tokens in {loaded.kv_cache_dtype}"
