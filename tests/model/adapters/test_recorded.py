"""Adapters that PEFT saved compute what PEFT's own model, nothing merged, computes of them."""

import torch

from tests.model.adapters.conftest import RECORDED, Recording, Store, logits

KINDS = ("bert-classifier", "gpt2", "llama", "llama-dora", "llama-embedding", "llama-vocabulary", "t5")


def test_every_kind_was_recorded() -> None:
    assert {path.stem for path in RECORDED} >= set(KINDS)


def test_a_recorded_adapter_gives_the_logits_of_peft(store: Store, recording: Recording) -> None:
    found = logits(store(recording.tensors, base=recording.base, config=recording.config))
    last = found[-len(recording.logits) :]
    torch.testing.assert_close(last, recording.logits, rtol=1e-4, atol=5e-5)
