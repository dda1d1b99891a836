"""Reads an adapter's pairs as a decoder's layers use them: fused projections have all of their modules' pairs as one.

    A = [A_q; A_k; A_v]  [R, K]      B = blocks scale_q B_q, scale_k B_k, scale_v B_v  [N, R]      R = r_q + r_k + r_v

Where a pair goes is `model.adapters.places`' to say, and what is computed with it `model.adapters.low_rank`'s. Runs in
the worker process, on its loader thread.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.adapters.config import ADAPTER_WEIGHTS
from model.adapters.low_rank import AdapterWeights
from model.adapters.places import Pair, shared_pairs
from model.checkpoint import reordered
from model.stored_tensors import StoredTensors


def load_adapter_weights(folder: Path, base: Path, dtype: torch.dtype, device: torch.device) -> AdapterWeights:
    """Raises: CheckpointError, naming the file and the tensor at fault."""
    targets: dict[tuple[int, str], list[Pair]] = {}
    for pair in shared_pairs(folder, base):
        targets.setdefault((pair.place.layer, pair.place.projection), []).append(pair)
    with StoredTensors(folder, single=ADAPTER_WEIGHTS) as stored:
        return AdapterWeights(_fused(targets, stored), dtype, device)


def _fused(
    targets: dict[tuple[int, str], list[Pair]], stored: StoredTensors
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    for (layer, projection), pairs in targets.items():
        a = torch.cat([_read(stored, pair.a) for pair in pairs])
        b = torch.zeros(pairs[0].place.num_outputs, len(a))
        first = 0
        for pair in pairs:
            part = _read(stored, pair.b) * pair.scale
            if pair.place.order is not None:
                part = reordered(part, pair.place.order)
            b[pair.place.start : pair.place.end, first : first + part.shape[1]] = part
            first += part.shape[1]
        yield layer, projection, a, b


def _read(stored: StoredTensors, name: str) -> Tensor:
    """In float32. Raises: CheckpointError where a value is no number."""
    tensor = stored.tensors[name]
    found = stored.read(tensor).float()
    if not found.isfinite().all():
        raise tensor.refused("holds values that are no finite numbers")
    return found
