"""The folder that a checkpoint is read from in the worker: its own, or an adapter's joined with its base's.

Runs in the worker process and in those of its ranks, on their loader threads.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from model.adapters.folder import joined
from service.engine.protocol import ModelSpec


def folder_of(spec: ModelSpec) -> AbstractContextManager[Path]:
    """There until the block ends. Raises: CheckpointError."""
    return joined(Path(spec.folder), None if spec.base is None else Path(spec.base))
