"""What can be wrong with a checkpoint: raised while a folder is found, described or loaded, never for a request.

Plain exceptions whose message is advice to whoever chose the checkpoint. Knows nothing of tensors or HTTP; used in
both processes.
"""


class CheckpointError(Exception):
    """A checkpoint cannot be used; `file` and `tensor` name the culprit where there is one."""

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint is sound, but of a kind that this project has no network for."""


class HubError(CheckpointError):
    """A checkpoint could not be fetched from the Hugging Face hub (unknown, forbidden, offline, network)."""
