"""Where a checkpoint is computed and in which numbers: what was asked for, or what suits its device and its task.

Knows settings, what a folder stores and what a config says. Runs in the worker process.
"""

from pathlib import Path

import torch

from model.config import DecoderConfig, EncoderDecoderConfig
from model.errors import CheckpointError
from model.ops import library
from model.stored_weights import StoredWeights
from service.engine.protocol import ModelSpec, Quantization


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise CheckpointError(f"the device is to be {name}; torch {torch.__version__} finds {found} CUDA devices")
    return device


def quantization_of(spec: ModelSpec, *, generates: bool) -> Quantization:
    """4 bits are sooner read, which is what generating waits for. A single pass over texts waits for its products, and
    they gain nothing: there int4 means int8."""
    return "int8" if spec.quantization == "int4" and not generates else spec.quantization


def dtype_of(spec: ModelSpec, folder: Path, device: torch.device) -> torch.dtype:
    """What was asked for; else bfloat16 on GPUs and between weights in 8 or 4 bits, and on CPUs float32 unless the
    weights are stored in 16 bits and there are operators for them, the project's or the CPU's own."""
    if spec.dtype != "auto":
        found: torch.dtype = getattr(torch, spec.dtype)
        return found
    if device.type == "cuda" or (spec.quantization in ("int8", "int4") and library.LOADED):
        return torch.bfloat16
    with StoredWeights(folder) as stored:
        narrow = stored.common_dtype().itemsize == 2
    fast = library.LOADED or library.torch_has_bfloat16()
    return torch.bfloat16 if narrow and fast else torch.float32


def cache_dtype_of(
    spec: ModelSpec,
    config: DecoderConfig | EncoderDecoderConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.dtype:
    """Of keys and values: 8 bits where they were asked for and attention reads them. Networks whose scores are more
    than products, or whose heads have unusual sizes, keep the dtype of their activations.

    Raises: CheckpointError where nothing reads 8 bits.
    """
    if spec.kv_cache_dtype == "auto":
        return dtype
    if device.type != "cpu" or dtype != torch.bfloat16 or not library.LOADED or block_size % 16:
        raise CheckpointError(
            "kv_cache_dtype int8 is not to be had here: it needs a CPU, dtype bfloat16, the compiled operators and "
            "blocks of a multiple of 16 tokens"
        )
    return torch.int8 if library.attends(block_size, config.head_size) and has_plain_scores(config) else dtype


def has_plain_scores(config: DecoderConfig | EncoderDecoderConfig) -> bool:
    """Whether attention's scores are products and nothing else."""
    if isinstance(config, EncoderDecoderConfig):
        return config.positions != "relative"
    return config.positions != "alibi" and config.attention_softcap is None
