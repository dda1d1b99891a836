"""Loads an adapter that is computed beside its base: small weights, for a lane that is there.

Runs in the worker process, on its loader thread; what it returns belongs to the main thread from then on.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.adapters.low_rank import AdapterWeights
from model.adapters.pairs import load_adapter_weights
from model.errors import CheckpointError
from service.engine.chosen_numbers import device_of, dtype_of
from service.engine.protocol import Loaded, ModelSpec, WorkerConfig

log = logging.getLogger("slimpajama.worker")


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    base: str
    """The key of the lane that it is for."""
    weights: AdapterWeights
    loaded: Loaded

    def loaded_with(self, base: Loaded) -> Loaded:
        """It has the blocks of its base to write to, and adds none; its base's weights are quantized or not."""
        return msgspec.structs.replace(
            self.loaded,
            num_blocks=base.num_blocks,
            block_size=base.block_size,
            kv_cache_dtype=base.kv_cache_dtype,
            quantization=base.quantization,
        )


def load_adapter(spec: ModelSpec, config: WorkerConfig) -> LoadedAdapter:
    """Raises CheckpointError, naming file and tensor, if the adapter is not what it should be."""
    assert spec.shares is not None
    assert spec.base is not None
    if config.num_ranks > 1:
        raise CheckpointError("adapters beside their base are not to be had with tensor_parallel_size above 1")
    began = time.monotonic()
    device = device_of(config.device)
    base = Path(spec.base)
    dtype = dtype_of(spec, base, device)
    weights = load_adapter_weights(Path(spec.folder), base, dtype, device)
    loaded = Loaded(
        model=spec.key,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        weight_bytes=weights.num_bytes,
        load_seconds=time.monotonic() - began,
    )
    extra = {"model": spec.key, "base": spec.shares, "dtype": loaded.dtype, "weight_bytes": loaded.weight_bytes}
    log.info("adapter loaded", extra=extra)
    return LoadedAdapter(spec.shares, weights, loaded)
