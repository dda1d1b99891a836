"""Eight-bit storage: matrices as float8 (e4m3, no scales), the rest as float16; and training that is ready for it.

A layer sees the rounded weights, the optimizer moves the exact ones: the straight-through estimator
(arXiv:1308.3432). So the network has learnt to live with the rounding before it is stored.
Runs in the training process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def stored(tensor: Tensor) -> Tensor:
    """The form in which a weight lies in the checkpoint: matrices in 8 bits, vectors in 16."""
    return tensor.detach().to(torch.float8_e4m3fn if tensor.dim() == 2 else torch.float16)


@contextmanager
def rounded_weights(network: nn.Module) -> Iterator[None]:
    """Within it, the network's weights are what the checkpoint would hold; gradients reach the exact ones."""
    weights = [parameter.data for parameter in network.parameters()]
    exact = [weight.clone() for weight in weights]
    for weight in weights:
        weight.copy_(stored(weight))
    try:
        yield
    finally:
        torch._foreach_copy_(weights, exact)
