"""Weight averaging: a finished network moved a share of the way back to its start.

Fine-tuning gains on its tasks and forgets some of what its start could do; on the line between the two lie networks
that keep most of both (WiSE-FT, arXiv:2109.01903). Takes and changes weights alone. Runs in the training process.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def move_back(network: nn.Module, start: dict[str, Tensor], share: float) -> None:
    """Set every weight to (1 - share) of itself plus `share` of the start's; with a share of 0.25, weights 1 and 5
    (start) become 2."""
    for name, weight in network.state_dict().items():
        weight.lerp_(start[name].to(weight), share)
