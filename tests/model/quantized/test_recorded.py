"""Checkpoints that the formats' own packages quantized compute what these, or transformers, compute of them."""

import weakref

import pytest
import torch
from torch import Tensor

from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network
from model.decoder import Decoder
from model.stored_tensors import StoredTensor
from model.stored_weights import StoredWeights
from tests.model.quantized.conftest import RECORDED, Recording, Store

IDS = [3, 17, 5, 44, 60, 12, 9, 31, 2, 58, 40, 7]
METHODS = ("awq", "bitsandbytes", "compressed", "fp8", "gptq")


def logits(network: Decoder) -> Tensor:
    layout = PackedLayout(starts=torch.tensor([0, len(IDS)], dtype=torch.int32), max_len=len(IDS))
    with torch.inference_mode():
        positions = torch.arange(len(IDS))
        return network.logits(network(torch.tensor(IDS), positions, PackedAttend(layout, ReferenceAttention())))


def test_every_method_was_recorded() -> None:
    assert {path.stem.partition("-")[0] for path in RECORDED} == set(METHODS)


def test_a_recorded_checkpoint_gives_the_logits_of_its_reference(store: Store, recording: Recording) -> None:
    network = load_network(store(recording.tensors, config=recording.config), dtype=torch.float32)
    assert isinstance(network, Decoder)
    torch.testing.assert_close(logits(network), recording.logits, rtol=1e-4, atol=1e-4)


def test_parts_of_a_weight_may_lie_in_different_files(store: Store, recording: Recording) -> None:
    whole = load_network(store(recording.tensors, config=recording.config))
    sharded = load_network(store(recording.tensors, config=recording.config, shards=5, folder="sharded"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, sharded.get_parameter(name)), name


def test_one_weight_at_a_time_is_plain(store: Store, recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part before stayed in memory while the next one of a joined parameter was read."""
    read, seen = StoredWeights.read, []

    def watched(stored: StoredWeights, tensor: StoredTensor) -> Tensor:
        assert not [earlier for earlier in seen if earlier() is not None]
        found = read(stored, tensor)
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(StoredWeights, "read", watched)
    load_network(store(recording.tensors, config=recording.config))
    assert len(seen) == 11


def test_without_a_dtype_the_one_of_what_is_not_quantized_is_taken(store: Store, recording: Recording) -> None:
    network = load_network(store(recording.tensors, config=recording.config))
    expected = recording.tensors["model.norm.weight"].dtype
    assert {parameter.dtype for parameter in network.parameters()} == {expected}
