"""What an encoder's layer does between its products, against float64."""

import torch
from torch import Tensor

SIZE = 64


def layer_norm(x: Tensor, weight: float = 1.0) -> Tensor:
    return torch.nn.functional.layer_norm(x, (SIZE,)) * weight


def test_gelu_is_near_the_exact_one_everywhere(instructions: str) -> None:
    """Attention adds nothing and both of the MLP's matrices change nothing, so that the activation alone is left."""
    spread = 3.0
    same, nothing, zeros = torch.eye(SIZE), torch.empty(0), torch.zeros(SIZE)
    tensors = []
    for weight in (torch.zeros(3 * SIZE, SIZE), torch.zeros(SIZE, SIZE), same, same):
        packed = torch.ops.slimpajama.pack_float32(weight)
        tensors += [packed, nothing, nothing, nothing, torch.zeros(len(weight))]
    tensors += [torch.full((SIZE,), spread), zeros, torch.ones(SIZE), zeros]
    layers = torch.classes.slimpajama.EncoderLayers(1, 1.0, 1e-5, "gelu")
    layers.add(tensors, SIZE, SIZE)
    hidden = torch.randn(4000, SIZE, generator=torch.Generator().manual_seed(0))
    normed = layer_norm(hidden.double(), spread)
    assert normed.abs().max() > 3 * spread
    layers.run(hidden, torch.arange(0, 4001, 8, dtype=torch.int32))
    expected = layer_norm(normed + torch.nn.functional.gelu(normed))
    assert (hidden - expected).abs().max() < 3e-6
