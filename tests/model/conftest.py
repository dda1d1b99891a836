"""The instructions that the operators can do without: each test of theirs runs on every set that is to be had."""

from collections.abc import Iterator

import pytest
import torch

from model.ops import library


@pytest.fixture(params=["amx", "avx512", "lanes"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    if not library.LOADED:
        pytest.skip("the operators were not compiled (no C++ compiler?)")
    try:
        if torch.ops.slimpajama.limit_instructions(request.param) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        torch.ops.slimpajama.limit_instructions("amx")
