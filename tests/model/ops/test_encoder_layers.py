"""What an encoder does before its products and between them, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

SIZE = 64
STARTS = torch.arange(0, 4001, 8, dtype=torch.int32)


def layer_norm(x: Tensor, weight: float = 1.0) -> Tensor:
    return torch.nn.functional.layer_norm(x, (SIZE,)) * weight


def layer(up: Tensor, *, spread: float = 1.0) -> Any:
    """A layer whose attention adds nothing, and whose MLP adds gelu(up x); `spread` is its first norm's weight."""
    nothing, zeros, ones = torch.empty(0), torch.zeros(SIZE), torch.ones(SIZE)
    tensors = []
    for weight in (torch.zeros(3 * SIZE, SIZE), torch.zeros(SIZE, SIZE), up, torch.eye(SIZE)):
        packed = torch.ops.slimpajama.pack_float32(weight)
        tensors += [packed, nothing, nothing, nothing, torch.zeros(len(weight))]
    layers = torch.classes.slimpajama.EncoderLayers(1, 1.0, 1e-5, "gelu", False, False)
    layers.add([*tensors, spread * ones, zeros, ones, zeros], SIZE, SIZE, 0)
    return layers


def test_gelu_is_near_the_exact_one_everywhere(instructions: str) -> None:
    layers, spread = layer(torch.eye(SIZE), spread=3.0), 3.0
    table = torch.randn(4000, SIZE, generator=torch.Generator().manual_seed(0))
    layers.embed_with(table, None, None, torch.ones(SIZE), torch.zeros(SIZE))
    ids = torch.arange(4000)
    normed = layer_norm(layer_norm(table.double()), spread)
    assert normed.abs().max() > 3 * spread
    expected = layer_norm(normed + torch.nn.functional.gelu(normed))
    deviations = (normed + torch.nn.functional.gelu(normed)).std(dim=1, correction=0, keepdim=True)
    assert ((layers.run(ids, ids, ids, STARTS, None, None) - expected) * deviations).abs().max() < 6e-6


@pytest.mark.parametrize("missing", [(), (1,), (2,), (1, 2)])
def test_rows_of_the_tables_are_added_up_and_normalized(instructions: str, missing: tuple[int, ...]) -> None:
    layers, generator = layer(torch.zeros(SIZE, SIZE)), torch.Generator().manual_seed(0)
    tables = [torch.randn(rows, SIZE, generator=generator) for rows in (90, 2, 8)]
    numbers = [torch.randint(len(table), (4000,), generator=generator) for table in tables]
    weight, bias = torch.randn(2, SIZE, generator=generator)
    layers.embed_with(*(None if place in missing else table for place, table in enumerate(tables)), weight, bias)
    pairs = zip(tables, numbers, strict=True)
    rows = [table.double()[row] for place, (table, row) in enumerate(pairs) if place not in missing]
    expected = layer_norm(layer_norm(layer_norm(sum(rows, torch.zeros(()))) * weight + bias))
    assert (layers.run(*numbers, STARTS, None, None) - expected).abs().max() < 3e-5


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_row_that_a_table_does_not_have_is_refused(instructions: str, place: int) -> None:
    layers = layer(torch.zeros(SIZE, SIZE))
    layers.embed_with(*(torch.zeros(5, SIZE) for _ in range(3)), torch.ones(SIZE), torch.zeros(SIZE))
    numbers = [torch.zeros(8, dtype=torch.int64) for _ in range(3)]
    for wrong in (-1, 5):
        numbers[place][7] = wrong
        with pytest.raises(IndexError, match=f"row {wrong} of a table of 5"):
            layers.run(*numbers, torch.tensor([0, 8], dtype=torch.int32), None, None)


@pytest.mark.parametrize("starts", [[0, 7], [0, 9], [1, 8], []])
def test_texts_that_are_not_the_tokens_there_are_are_refused(instructions: str, starts: list[int]) -> None:
    layers, ids = layer(torch.zeros(SIZE, SIZE)), torch.zeros(8, dtype=torch.int64)
    layers.embed_with(torch.zeros(5, SIZE), None, None, torch.ones(SIZE), torch.zeros(SIZE))
    with pytest.raises(RuntimeError, match="starts begin with 0"):
        layers.run(ids, ids, ids, torch.tensor(starts, dtype=torch.int32), None, None)
