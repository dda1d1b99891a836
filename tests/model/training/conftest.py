"""Factories for tiny networks and the place of the open data, which a test may lack."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.training.networks import Bert, BertShape, Llama, LlamaShape

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def data() -> Path:
    if not DATA.exists():
        pytest.skip("the open data sets are not beside the repository (../shared/data)")
    return DATA


@pytest.fixture
def make_llama() -> Callable[..., Llama]:
    def make(vocab_size: int = 300, seed: int = 0) -> Llama:
        torch.manual_seed(seed)
        shape = LlamaShape(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            context_length=64,
        )
        return Llama(shape)

    return make


@pytest.fixture
def make_bert() -> Callable[..., Bert]:
    def make(vocab_size: int = 120, num_layers: int = 2, intermediate_size: int = 48, seed: int = 0) -> Bert:
        torch.manual_seed(seed)
        shape = BertShape(
            vocab_size=vocab_size,
            hidden_size=24,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=4,
            context_length=32,
            dropout=0.0,
        )
        return Bert(shape)

    return make
