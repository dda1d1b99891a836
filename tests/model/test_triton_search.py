"""The kernel that picks among a whole vocabulary against the law that the CPU's search follows."""

import os

import pytest
import torch

from model.candidates import Filters, choose_among_all

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from model.triton_search import triton_search  # noqa: E402 - needs Triton

DEVICE = "cpu" if INTERPRETED else "cuda"
FILTERS = {
    "none": (0, 1.0, 0.0),
    "top k": (7, 1.0, 0.0),
    "more than there are": (10**6, 1.0, 0.0),
    "top p": (0, 0.6, 0.0),
    "min p": (0, 1.0, 0.2),
    "all": (40, 0.8, 0.05),
    "one": (1, 1.0, 0.0),
    "tiny p": (0, 1e-9, 0.0),
}


def weights_of(kind: str, rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + size)
    logits = torch.randn((rows, size), generator=generator)
    if kind == "ties":  # as bfloat16 logits have them
        logits = (logits * 2).round() / 2
    if kind == "steep":
        logits = logits * 30
    return (logits - logits.amax(1, keepdim=True)).exp()


@pytest.mark.parametrize("kind", ["flat", "ties", "steep"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_the_kernel_picks_what_the_law_says(kind, filters):
    rows, size = 4, 3001
    weights = weights_of(kind, rows, size)
    noise = torch.tensor([0.0, 0.25, 0.7, 1 - 1e-9], dtype=torch.float64)
    given = Filters(
        torch.full((rows,), filters[0]),
        torch.full((rows,), filters[1]).double(),
        torch.full((rows,), filters[2]).double(),
    )
    expected = choose_among_all(weights, noise, given)
    found = triton_search(
        weights.to(DEVICE),
        noise.to(DEVICE),
        (given.top_k.to(DEVICE), given.top_p.to(DEVICE), given.min_p.to(DEVICE)),
        torch.full((rows,), -1, device=DEVICE),
        torch.zeros(rows, dtype=torch.bool, device=DEVICE),
    )
    assert found.tolist() == expected.tolist()


def test_rows_that_are_decided_keep_their_token():
    weights, noise = weights_of("flat", 2, 100), torch.full((2,), 0.5).double()
    filters = Filters(torch.zeros(2, dtype=torch.int64), torch.ones(2).double(), torch.zeros(2).double())
    expected = choose_among_all(weights, noise, filters).tolist()
    given = [expected[0] + 1, expected[1] + 1]
    found = triton_search(
        weights.to(DEVICE),
        noise.to(DEVICE),
        (filters.top_k.to(DEVICE), filters.top_p.to(DEVICE), filters.min_p.to(DEVICE)),
        torch.tensor(given, device=DEVICE),
        torch.tensor([True, False], device=DEVICE),
    )
    assert found.tolist() == [given[0], expected[1]]
